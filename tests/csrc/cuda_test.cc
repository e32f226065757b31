// Compares the CUDA kernels, compiled for the host with cuda_shim, with the CPU path at awkward
// sizes. Exits with 1 at the first failed check.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "csrc/device.h"
#include "csrc/ops.h"
#include "tests/csrc/cuda_testing.h"
#include "tests/csrc/testing.h"

namespace edgeclip {
namespace {

void test_classify(int64_t n, int64_t k, int64_t d) {
  Problem problem(n, k, d);
  for (bool halves : {false, true}) {
    if (halves && k > 100) break;
    if (halves) problem.use_halves();
    check_result(problem.solve(Device::kCuda), problem.solve(Device::kCpu), n, 1e-4f);
  }
}

// Different batch sizes use different tile shapes.
void test_classify_in_any_batch() {
  Problem problem(19, 37, 70);
  for (bool halves : {false, true}) {
    if (halves) problem.use_halves();
    const Result all = problem.solve(Device::kCuda);
    const Result batch = problem.solve(Device::kCuda, 3, 9);
    for (int64_t i : {0, 3, 11, 18}) {
      const Result alone = problem.solve(Device::kCuda, i, 1);
      CHECK(all.row(i, 19) == alone);
      if (i >= 3 && i < 12) CHECK(batch.row(i - 3, 9) == alone);
    }
  }
}

void test_ties_and_extremes() {
  Problem problem(2, 40, 8);
  problem.options.top_k = 40;
  problem.options.purify.steps = 0;
  for (int64_t c = 8; c < 40; ++c) {
    std::copy_n(problem.weights.begin() + c % 8 * 8, 8, problem.weights.begin() + c * 8);
  }
  for (double scale : {3.0, 0.0, -1e4, 1e4}) {
    problem.options.logit_scale = scale;
    const float tolerance = 1e-5f * static_cast<float>(std::fabs(scale) + 1);
    check_result(problem.solve(Device::kCuda), problem.solve(Device::kCpu), 2, tolerance);
  }
}

// Embeddings whose raw scores cannot be combined into purified ones: near the null text, or with
// norms whose products overflow or underflow.
void test_purified_vectors_are_formed() {
  Problem problem(3, 33, 64);
  for (int64_t i = 0; i < 64; ++i) {
    problem.embeddings[i] = problem.null_text[i] + 1e-3f * problem.embeddings[i];
    problem.embeddings[64 + i] *= 1e-30f;
    problem.embeddings[128 + i] *= 1e30f;
  }
  check_result(problem.solve(Device::kCuda), problem.solve(Device::kCpu), 3, 2e-4f);
  problem.options.purify.steps = 0;
  check_result(problem.solve(Device::kCuda), problem.solve(Device::kCpu), 3, 2e-4f);
  Problem large(1, 1025, 3);
  for (float& value : large.embeddings) value *= 1e20f;
  check_result(large.solve(Device::kCuda), large.solve(Device::kCpu), 1, 2e-4f);
}

// Indices -1 and probabilities NaN where the CPU path throws.
void test_invalid_samples() {
  const auto is_invalid = [](const Result& result) {
    return std::all_of(result.indices.begin(), result.indices.end(),
                       [](int32_t index) { return index == -1; }) &&
           std::all_of(result.probabilities.begin(), result.probabilities.end(),
                       [](float value) { return std::isnan(value); });
  };
  Problem problem(3, 7, 5);
  problem.embeddings[2] = NAN;
  std::fill_n(problem.embeddings.begin() + 5, 5, 0.0f);
  const Result result = problem.solve(Device::kCuda);
  CHECK(is_invalid(result.row(0, 3)) && is_invalid(result.row(1, 3)) &&
        !is_invalid(result.row(2, 3)));
  problem.weights[4] = INFINITY;
  CHECK(is_invalid(problem.solve(Device::kCuda).row(2, 3)));
  problem.weights[4] = 0;
  std::fill(problem.null_text.begin(), problem.null_text.end(), 0.0f);
  CHECK(is_invalid(problem.solve(Device::kCuda)));
  Problem large(1, 1025, 1);
  large.weights[3] = NAN;
  CHECK(is_invalid(large.solve(Device::kCuda)));
}

void test_purify_cos(int64_t n, int64_t d) {
  auto z = random_values(n * d, 1), t = random_values(d, 2);
  std::vector<float> expected(n * d), got(n * d);
  const auto purify = [&](const TensorView& rows, TensorView null_text, const TensorView& out) {
    null_text.device = rows.device;
    purify_cos(rows, null_text, out, {11, 3.0});
  };
  const TensorView null_text = view(t, {d}, kFloat32);
  purify(view(z, {n, d}, kFloat32), null_text, view(expected, {n, d}, kFloat32));
  purify(on_gpu(z, {n, d}, kFloat32), null_text, on_gpu(got, {n, d}, kFloat32));
  for (int64_t i = 0; i < n * d; ++i) CHECK(std::fabs(got[i] - expected[i]) <= 1e-6f);
  auto halves = round_to_half(z);
  purify(view(z, {n, d}, kFloat32), null_text, view(expected, {n, d}, kFloat32));
  TensorView in_place = on_gpu(halves, {n, d}, kFloat16);
  purify(in_place, null_text, in_place);
  for (int64_t i = 0; i < n * d; ++i) {
    CHECK(std::fabs(__half2float(halves[i]) - expected[i]) <= 2e-3f);
  }
}

void test_preprocess(TensorView image, std::vector<int64_t> target, Resize resize,
                     Interpolation interpolation) {
  const int64_t count = 3 * target[0] * target[1];
  const std::vector<int64_t> shape = {3, target[0], target[1]};
  const PreprocessOptions options{
      {0.48f, 0.46f, 0.41f}, {0.27f, 0.26f, 0.28f}, resize, interpolation, 7};
  std::vector<float> expected(count, NAN), got(count, NAN);
  std::vector<__half> halves(count);
  preprocess(image, view(expected, shape, kFloat32), options);
  image.device = Device::kCuda;
  const TensorView out = on_gpu(got, shape, kFloat32);
  const Workspace workspace(preprocess_workspace(image, out, options));
  preprocess(image, out, options, workspace.options());
  CHECK(got == expected);
  if (image.strides[0] % 16 == 0)
    return;  // float16 for half of the cases only, since threads are slow
  preprocess(image, on_gpu(halves, shape, kFloat16), options, workspace.options());
  for (int64_t i = 0; i < count; ++i) {
    CHECK(halves[i].bits == __float2half_rn(expected[i]).bits);
  }
}

// Kernels read rows padded to 16 bytes in vectors, other rows byte by byte.
void test_preprocess(int64_t height, int64_t width, std::vector<int64_t> target, Resize resize,
                     Interpolation interpolation, bool is_padded) {
  const int64_t pitch = is_padded ? (3 * width + 15) / 16 * 16 : 3 * width;
  auto pixels = random_pixels(height * pitch);
  TensorView image = view(pixels, {height, width, 3}, kUint8);
  image.strides[0] = pitch;
  test_preprocess(image, target, resize, interpolation);
}

void test_preprocess_flipped() {
  auto pixels = random_pixels(19 * 21 * 3);
  TensorView image = view(pixels, {19, 21, 3}, kUint8);
  image.data = pixels.data() + pixels.size() - 1;
  for (int64_t& stride : image.strides) stride = -stride;
  test_preprocess(image, {9, 7}, Resize::kShortest, Interpolation::kBicubic);
}

void test_all_preprocess() {
  // 300 x 20 takes the vertical pass first; a row of 2049 pixels is too long for shared memory.
  const std::vector<std::vector<int64_t>> sizes = {
      {1, 1, 1, 1},      {33, 17, 16, 16}, {17, 33, 16, 16}, {64, 48, 33, 17},
      {300, 20, 16, 16}, {20, 300, 5, 40}, {1, 2049, 1, 1},  {2049, 2, 1, 1}};
  int index = 0;
  for (const auto& size : sizes) {
    for (Resize resize : {Resize::kShortest, Resize::kLongest, Resize::kSquash}) {
      const auto interpolation = index % 4 < 2 ? Interpolation::kBicubic : Interpolation::kBilinear;
      test_preprocess(size[0], size[1], {size[2], size[3]}, resize, interpolation,
                      index++ % 2 == 0);
    }
  }
}

void test_errors() {
  Problem problem(1, 5, 8);
  std::vector<int32_t> indices(5);
  std::vector<float> probabilities(5);
  const ClassifyInputs inputs{on_gpu(problem.embeddings, {1, 8}, kFloat32),
                              on_gpu(problem.weights, {5, 8}, kFloat32), std::nullopt,
                              std::nullopt};
  const ClassifyOptions options{1.0, 0.0, {}, 5};
  const auto error = [&](const TensorView& out, const CudaOptions& cuda) {
    const ClassifyOutputs outputs{out, on_gpu(probabilities, {1, 5}, kFloat32), std::nullopt};
    return error_of([&] { classify(inputs, outputs, options, cuda); });
  };
  const Workspace small(16), enough(classify_workspace(1, 5));
  CHECK(error(view(indices, {1, 5}, kInt32), enough.options()) ==
        "[classify] expected out_indices in CUDA memory, got CPU");
  const TensorView out = on_gpu(indices, {1, 5}, kInt32);
  const std::string expected = "[classify] expected workspace of at least 4160 bytes of uint8";
  CHECK(error(out, {}).rfind(expected, 0) == 0);
  CHECK(error(out, small.options()).rfind(expected, 0) == 0);
  CHECK(error(out, enough.options()).empty());
  CHECK(error_of([] { classify_workspace(1, 0); }) ==
        "[classify_workspace] expected samples >= 0 and classes >= 1, got 1 and 0");
}

void test_all_classify() {
  const int64_t sizes[][3] = {{1, 1, 1},    {0, 3, 4},    {33, 33, 33}, {1, 1024, 1},
                              {1, 1025, 8}, {1, 2049, 1}, {2, 5, 512},  {33, 9, 1024},
                              {5, 7, 1025}, {2, 1025, 4}, {9, 70, 520}};
  for (const auto& size : sizes) test_classify(size[0], size[1], size[2]);
}

// A graph replays captured work on the current contents of its memory.
void test_graph() {
  const int64_t n = 3, k = 7, d = 33;
  Problem problem(n, k, d);
  const auto on_device = [](const std::vector<float>& values) {
    auto memory = std::make_unique<cuda::Memory>(values.size() * sizeof(float), false);
    std::memcpy(memory->data(), values.data(), values.size() * sizeof(float));
    return memory;
  };
  const auto classes = on_device(problem.weights);
  const auto embeddings = on_device(problem.embeddings);
  const cuda::Memory indices(n * k * 4, true), probabilities(n * k * 4, true);
  const cuda::Memory scratch(classify_workspace(n, k), false);
  const auto place = [](const cuda::Memory& memory, std::vector<int64_t> shape, DType dtype) {
    TensorView tensor{memory.data(), dtype, shape, {}, Device::kCuda, true};
    int64_t stride = dtype.bytes;
    for (size_t axis = shape.size(); axis-- > 0; stride *= shape[axis]) {
      tensor.strides.insert(tensor.strides.begin(), stride);
    }
    return tensor;
  };
  const cuda::Stream stream;
  const auto queue = [&] {
    classify({place(*embeddings, {n, d}, kFloat32), place(*classes, {k, d}, kFloat32), {}, {}},
             {place(indices, {n, k}, kInt32), place(probabilities, {n, k}, kFloat32), {}},
             {1.0, 0.0, {}, k}, {stream.handle(), place(scratch, {scratch.bytes()}, kUint8)});
  };
  queue();
  cuda::synchronize(stream.handle());
  std::vector<float> first(n * k), again(n * k);
  std::memcpy(first.data(), probabilities.data(), first.size() * sizeof(float));
  std::memset(probabilities.data(), 0, first.size() * sizeof(float));

  stream.begin_capture();
  queue();
  const auto graph = stream.end_capture();
  std::memcpy(again.data(), probabilities.data(), again.size() * sizeof(float));
  CHECK(std::count(again.begin(), again.end(), 0.0f) == n * k);  // a capture runs nothing
  graph->launch(stream.handle());
  cuda::synchronize(stream.handle());
  std::memcpy(again.data(), probabilities.data(), again.size() * sizeof(float));
  CHECK(first == again);

  // Other embeddings at the same address: a graph stores addresses, not values.
  std::vector<float> reversed(problem.embeddings.rbegin(), problem.embeddings.rend());
  cuda::copy(embeddings->data(), reversed.data(), reversed.size() * sizeof(float), stream.handle());
  queue();
  cuda::synchronize(stream.handle());
  std::memcpy(first.data(), probabilities.data(), first.size() * sizeof(float));
  CHECK(first != again);
  std::memset(probabilities.data(), 0, first.size() * sizeof(float));
  graph->launch(stream.handle());
  cuda::synchronize(stream.handle());
  std::memcpy(again.data(), probabilities.data(), again.size() * sizeof(float));
  CHECK(first == again);

  stream.begin_capture();
  queue();
  stream.abandon_capture();
  cuda::Event begin, end;
  begin.record(stream.handle());
  queue();
  end.record(stream.handle());
  CHECK(end.milliseconds_since(begin) >= 0);
}

// Errors name the failed CUDA call: without a GPU, and for work that cannot be captured.
void test_device_errors() {
  const auto fails_with = [](const auto& work, const char* message) {
    return error_of(work).find(message) != std::string::npos;
  };
  const cuda::Stream stream;
  stream.begin_capture();
  CHECK(
      fails_with([&] { cuda::synchronize(stream.handle()); }, "cudaErrorStreamCaptureUnsupported"));
  CHECK(fails_with([&] { stream.begin_capture(); }, "cudaStreamBeginCapture"));
  CHECK(fails_with([] { cuda::Memory(8, false); }, "cudaErrorStreamCaptureUnsupported"));
  CHECK(fails_with([&] { stream.end_capture(); }, "cudaErrorStreamCaptureInvalidated"));
  stream.abandon_capture();  // no effect without a capture
  setenv("EDGECLIP_SHIM_NO_GPU", "1", 1);
  CHECK(fails_with([] { cuda::Memory(8, false); }, "cudaMalloc(8 bytes): cudaErrorNoDevice"));
  CHECK(fails_with([] { cuda::Memory(8, true); }, "cudaHostAlloc(8 bytes): cudaErrorNoDevice"));
  CHECK(fails_with([] { cuda::Stream(); }, "cudaStreamCreate"));
  CHECK(fails_with([] { cuda::device_info(); }, "cudaGetDevice"));
  unsetenv("EDGECLIP_SHIM_NO_GPU");
  CHECK(cuda::device_info().major == 8);
}

}  // namespace
}  // namespace edgeclip

// Usage: "all"; "threads", a subset for the thread sanitizer; "one-launch [N]" or "two-launches
// [N]", a kernel with barriers, of which the N-th is skipped.
int main(int argc, char** argv) {
  using namespace edgeclip;
  const std::string mode = argc > 1 ? argv[1] : "all";
  if (argc > 2) shim::skipped_barrier = std::atoi(argv[2]);
  if (mode == "one-launch") {
    Problem(1, 40, 8).solve(Device::kCuda);
  } else if (mode == "two-launches") {
    Problem(1, 1025, 1).solve(Device::kCuda);
  } else if (mode == "threads") {
    test_graph();
    for (int64_t n : {1, 9, 17}) test_classify(n, 33, 33);
    test_classify(1, 1025, 3);
    test_purify_cos(9, 33);
    test_preprocess(64, 48, {17, 16}, Resize::kLongest, Interpolation::kBicubic, true);
    test_preprocess(300, 20, {16, 16}, Resize::kSquash, Interpolation::kBicubic, false);
  } else {
    test_graph();
    test_device_errors();
    test_all_classify();
    test_classify_in_any_batch();
    test_ties_and_extremes();
    test_purified_vectors_are_formed();
    test_invalid_samples();
    for (int64_t n : {0, 1, 33}) test_purify_cos(n, 33);
    test_purify_cos(2, 1025);
    test_preprocess_flipped();
    test_all_preprocess();
    test_errors();
  }
  std::puts("ok");
}
