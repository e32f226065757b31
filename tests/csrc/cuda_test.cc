// Drives the CUDA kernels, compiled for the host by cuda_shim, at awkward sizes against the CPU
// path. Exits with 1 at the first check that fails.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/device.h"
#include "csrc/ops.h"
#include "tests/csrc/testing.h"

namespace edgeclip {
namespace {

template <typename T>
TensorView on_gpu(std::vector<T>& values, std::vector<int64_t> shape, DType dtype) {
  TensorView result = view(values, std::move(shape), dtype);
  result.device = Device::kCuda;
  return result;
}

// Aligned as cudaMalloc's, and exactly as long as asked for.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes), data_(::operator new(bytes, kAlignment)) {
    std::memset(data_, 0, bytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(data_, kAlignment); }
  CudaOptions options() const {
    return {0, TensorView{data_, kUint8, {bytes_}, {1}, Device::kCuda, true}};
  }

 private:
  static constexpr std::align_val_t kAlignment{256};

  int64_t bytes_;
  void* data_;
};

// To the nearest float16, in place, and as such.
std::vector<__half> round_to_half(std::vector<float>& values) {
  std::vector<__half> halves;
  for (float& value : values) {
    halves.push_back(__float2half_rn(value));
    value = __half2float(halves.back());
  }
  return halves;
}

struct Answer {
  std::vector<int32_t> indices;
  std::vector<float> probabilities, logits;

  bool operator==(const Answer& other) const {
    return indices == other.indices && probabilities == other.probabilities &&
           logits == other.logits;
  }
  Answer row(int64_t i, int64_t n) const {
    const auto part = [&](const auto& all) {
      const auto size = static_cast<int64_t>(all.size()) / n;
      return std::decay_t<decltype(all)>(all.begin() + i * size, all.begin() + (i + 1) * size);
    };
    return {part(indices), part(probabilities), part(logits)};
  }
};

struct Problem {
  Problem(int64_t samples, int64_t classes, int64_t dims)
      : n(samples), k(classes), d(dims), embeddings(random_values(n * d, 1)) {
    weights = random_values(k * d, 2);
    for (float& weight : weights) weight /= std::sqrt(static_cast<float>(d));
    null_text = random_values(d, 3);
    double squared = 0;
    for (float value : null_text) squared += double{value} * value;
    for (int64_t c = 0; c < k; ++c) {
      const double score =
          std::inner_product(null_text.begin(), null_text.end(), weights.begin() + c * d, 0.0);
      null_scores.push_back(static_cast<float>(score / std::sqrt(squared)));
    }
  }

  // From now on for the GPU; and what the CPU gets has the same values.
  void use_halves() {
    round_to_half(embeddings);
    half_weights = round_to_half(weights);
  }

  Answer solve(Device device, int64_t first, int64_t count) {
    const int64_t top = std::min(options.top_k, k);
    Answer answer{std::vector<int32_t>(count * top, -7), std::vector<float>(count * top),
                  std::vector<float>(count * k)};
    const auto place = [&](TensorView tensor) {
      tensor.device = device;
      return tensor;
    };
    std::vector<float> part(embeddings.begin() + first * d,
                            embeddings.begin() + (first + count) * d);
    ClassifyInputs inputs{
        place(view(part, {count, d}, kFloat32)), place(view(weights, {k, d}, kFloat32)),
        place(view(null_text, {d}, kFloat32)), place(view(null_scores, {k}, kFloat32))};
    std::vector<__half> half_part;
    if (device == Device::kCuda && !half_weights.empty()) {
      half_part = round_to_half(part);
      inputs.embeddings = on_gpu(half_part, {count, d}, kFloat16);
      inputs.classes = on_gpu(half_weights, {k, d}, kFloat16);
    }
    const ClassifyOutputs outputs{place(view(answer.indices, {count, top}, kInt32)),
                                  place(view(answer.probabilities, {count, top}, kFloat32)),
                                  place(view(answer.logits, {count, k}, kFloat32))};
    const Workspace workspace(classify_workspace(count, k));
    classify(inputs, outputs, options, workspace.options());
    return answer;
  }
  Answer solve(Device device) { return solve(device, 0, n); }

  int64_t n, k, d;
  std::vector<float> embeddings, weights, null_text, null_scores;
  std::vector<__half> half_weights;
  ClassifyOptions options{10.0, 0.25, {3, 0.4}, 5};
};

// The logits are the CPU's but for rounding; order and softmax are right for these very logits.
void check_answer(const Answer& got, const Answer& expected, int64_t n, float tolerance) {
  if (n == 0) return;
  const int64_t k = static_cast<int64_t>(got.logits.size()) / n;
  const int64_t top = static_cast<int64_t>(got.indices.size()) / n;
  for (size_t i = 0; i < got.logits.size(); ++i) {
    CHECK(std::fabs(got.logits[i] - expected.logits[i]) <= tolerance);
  }
  for (int64_t i = 0; i < n; ++i) {
    const float* logits = got.logits.data() + i * k;
    std::vector<int32_t> order(k);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t x, int32_t y) { return logits[x] > logits[y]; });
    double sum = 0;
    for (int64_t c = 0; c < k; ++c) sum += std::exp(double{logits[c]} - logits[order[0]]);
    for (int64_t j = 0; j < top; ++j) {
      CHECK(got.indices[i * top + j] == order[j]);
      const double probability = std::exp(double{logits[order[j]]} - logits[order[0]]) / sum;
      CHECK(std::fabs(got.probabilities[i * top + j] - probability) <= 3e-6 * probability + 1e-30);
    }
  }
}

void test_classify(int64_t n, int64_t k, int64_t d) {
  Problem problem(n, k, d);
  for (bool halves : {false, true}) {
    if (halves && k > 100) break;
    if (halves) problem.use_halves();
    check_answer(problem.solve(Device::kCuda), problem.solve(Device::kCpu), n, 1e-4f);
  }
}

// Tiles of different shapes serve different batches.
void test_classify_in_any_batch() {
  Problem problem(19, 37, 70);
  for (bool halves : {false, true}) {
    if (halves) problem.use_halves();
    const Answer all = problem.solve(Device::kCuda);
    const Answer some = problem.solve(Device::kCuda, 3, 9);
    for (int64_t i : {0, 3, 11, 18}) {
      const Answer alone = problem.solve(Device::kCuda, i, 1);
      CHECK(all.row(i, 19) == alone);
      if (i >= 3 && i < 12) CHECK(some.row(i - 3, 9) == alone);
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
    check_answer(problem.solve(Device::kCuda), problem.solve(Device::kCpu), 2, tolerance);
  }
}

// Embeddings whose purified scores cannot be had from their own: near the null text, or of a norm
// whose products overflow or vanish.
void test_purified_vectors_are_formed() {
  Problem problem(3, 33, 64);
  for (int64_t i = 0; i < 64; ++i) {
    problem.embeddings[i] = problem.null_text[i] + 1e-3f * problem.embeddings[i];
    problem.embeddings[64 + i] *= 1e-30f;
    problem.embeddings[128 + i] *= 1e30f;
  }
  check_answer(problem.solve(Device::kCuda), problem.solve(Device::kCpu), 3, 2e-4f);
  problem.options.purify.steps = 0;
  check_answer(problem.solve(Device::kCuda), problem.solve(Device::kCpu), 3, 2e-4f);
  Problem large(1, 1025, 3);
  for (float& value : large.embeddings) value *= 1e20f;
  check_answer(large.solve(Device::kCuda), large.solve(Device::kCpu), 1, 2e-4f);
}

// Where the CPU path throws.
void test_what_has_no_answer() {
  const auto has_none = [](const Answer& answer) {
    return std::all_of(answer.indices.begin(), answer.indices.end(),
                       [](int32_t index) { return index == -1; }) &&
           std::all_of(answer.probabilities.begin(), answer.probabilities.end(),
                       [](float value) { return std::isnan(value); });
  };
  Problem problem(3, 7, 5);
  problem.embeddings[2] = NAN;
  std::fill_n(problem.embeddings.begin() + 5, 5, 0.0f);
  const Answer answer = problem.solve(Device::kCuda);
  CHECK(has_none(answer.row(0, 3)) && has_none(answer.row(1, 3)) && !has_none(answer.row(2, 3)));
  problem.weights[4] = INFINITY;
  CHECK(has_none(problem.solve(Device::kCuda).row(2, 3)));
  problem.weights[4] = 0;
  std::fill(problem.null_text.begin(), problem.null_text.end(), 0.0f);
  CHECK(has_none(problem.solve(Device::kCuda)));
  Problem large(1, 1025, 1);
  large.weights[3] = NAN;
  CHECK(has_none(large.solve(Device::kCuda)));
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
  if (image.strides[0] % 16 == 0) return;  // threads are slow
  preprocess(image, on_gpu(halves, shape, kFloat16), options, workspace.options());
  for (int64_t i = 0; i < count; ++i) {
    CHECK(halves[i].bits == __float2half_rn(expected[i]).bits);
  }
}

// Rows padded to 16 bytes are read in vectors, others byte by byte.
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
  // Of 300 x 20 the rows are resized first; a row of 2049 pixels for one is too long to be staged.
  const std::vector<std::vector<int64_t>> sizes = {
      {1, 1, 1, 1},      {33, 17, 16, 16}, {17, 33, 16, 16}, {64, 48, 33, 17},
      {300, 20, 16, 16}, {20, 300, 5, 40}, {1, 2049, 1, 1},  {2049, 2, 1, 1}};
  int turn = 0;
  for (const auto& size : sizes) {
    for (Resize resize : {Resize::kShortest, Resize::kLongest, Resize::kSquash}) {
      const auto how = turn % 4 < 2 ? Interpolation::kBicubic : Interpolation::kBilinear;
      test_preprocess(size[0], size[1], {size[2], size[3]}, resize, how, turn++ % 2 == 0);
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
  const std::string expected = "[classify] expected workspace to be 4160 or more bytes of uint8";
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

// What a graph has noted is done again with what is in the memory then, by itself or beside others.
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

  // Other embeddings at the same address: a graph notes where, not what.
  std::vector<float> turned(problem.embeddings.rbegin(), problem.embeddings.rend());
  cuda::copy(embeddings->data(), turned.data(), turned.size() * sizeof(float), stream.handle());
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

// A machine without a GPU, and work that cannot be captured: errors that name the call.
void test_device_errors() {
  const auto says = [](const auto& work, const char* words) {
    return error_of(work).find(words) != std::string::npos;
  };
  const cuda::Stream stream;
  stream.begin_capture();
  CHECK(says([&] { cuda::synchronize(stream.handle()); }, "cudaErrorStreamCaptureUnsupported"));
  CHECK(says([&] { stream.begin_capture(); }, "cudaStreamBeginCapture"));
  CHECK(says([] { cuda::Memory(8, false); }, "cudaErrorStreamCaptureUnsupported"));
  CHECK(says([&] { stream.end_capture(); }, "cudaErrorStreamCaptureInvalidated"));
  stream.abandon_capture();  // of none
  setenv("EDGECLIP_SHIM_NO_GPU", "1", 1);
  CHECK(says([] { cuda::Memory(8, false); }, "cudaMalloc(8 bytes): cudaErrorNoDevice"));
  CHECK(says([] { cuda::Memory(8, true); }, "cudaHostAlloc(8 bytes): cudaErrorNoDevice"));
  CHECK(says([] { cuda::Stream(); }, "cudaStreamCreate"));
  CHECK(says([] { cuda::device_info(); }, "cudaGetDevice"));
  unsetenv("EDGECLIP_SHIM_NO_GPU");
  CHECK(cuda::device_info().major == 8);
}

}  // namespace
}  // namespace edgeclip

// "all", or what is enough for the thread sanitizer, or one of the kernels that have barriers with
// the n-th of them missing: "one-launch N", "two-launches N".
int main(int argc, char** argv) {
  using namespace edgeclip;
  const std::string what = argc > 1 ? argv[1] : "all";
  if (argc > 2) shim::skipped_barrier = std::atoi(argv[2]);
  if (what == "one-launch") {
    Problem(1, 40, 8).solve(Device::kCuda);
  } else if (what == "two-launches") {
    Problem(1, 1025, 1).solve(Device::kCuda);
  } else if (what == "threads") {
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
    test_what_has_no_answer();
    for (int64_t n : {0, 1, 33}) test_purify_cos(n, 33);
    test_purify_cos(2, 1025);
    test_preprocess_flipped();
    test_all_preprocess();
    test_errors();
  }
  std::puts("ok");
}
