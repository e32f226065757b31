// Runs the operations at awkward sizes under the sanitizers; Python tests check their values. Exits
// with 1 at the first failed check.

#include "csrc/ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/parallel.h"
#include "tests/csrc/testing.h"

namespace edgeclip {
namespace {

PreprocessOptions preprocess_options(Resize resize, Interpolation interpolation, int64_t threads) {
  return {{0.5f, 0.4f, 0.3f}, {0.2f, 0.3f, 0.4f}, resize, interpolation, 7, threads};
}

void test_preprocess() {
  const std::vector<std::vector<int64_t>> sizes = {{1, 1},   {1, 2049}, {2049, 1},  {33, 17},
                                                   {17, 33}, {64, 48},  {20000, 1}, {1, 20000}};
  const std::vector<std::vector<int64_t>> targets = {{1, 1}, {32, 32}, {33, 17}, {5, 40}};
  for (const auto& size : sizes) {
    auto pixels = random_pixels(size[0] * size[1] * 3);
    const TensorView image = view(pixels, {size[0], size[1], 3}, kUint8);
    for (const auto& target : targets) {
      for (Resize resize : {Resize::kShortest, Resize::kLongest, Resize::kSquash}) {
        for (Interpolation interpolation : {Interpolation::kBicubic, Interpolation::kBilinear}) {
          std::vector<float> serial(3 * target[0] * target[1], NAN), parallel = serial;
          const std::vector<int64_t> shape = {3, target[0], target[1]};
          preprocess(image, view(serial, shape, kFloat32),
                     preprocess_options(resize, interpolation, 1));
          preprocess(image, view(parallel, shape, kFloat32),
                     preprocess_options(resize, interpolation, 5));
          CHECK(serial == parallel);  // also fails if a value is still NaN
        }
      }
    }
  }
}

void test_preprocess_flipped() {
  auto pixels = random_pixels(9 * 11 * 3);
  TensorView image = view(pixels, {9, 11, 3}, kUint8);
  std::vector<uint8_t> reversed(pixels.rbegin(), pixels.rend());
  TensorView flipped = view(reversed, {9, 11, 3}, kUint8);
  flipped.data = reversed.data() + reversed.size() - 1;
  for (int64_t& stride : flipped.strides) stride = -stride;
  std::vector<float> expected(3 * 7 * 7), got(3 * 7 * 7);
  const auto options = preprocess_options(Resize::kShortest, Interpolation::kBicubic, 3);
  preprocess(image, view(expected, {3, 7, 7}, kFloat32), options);
  preprocess(flipped, view(got, {3, 7, 7}, kFloat32), options);
  CHECK(got == expected);
}

void test_purify_cos() {
  for (int64_t dim : {1, 2, 15, 16, 17, 33, 2049}) {
    for (int64_t samples : {0, 1, 3, 33}) {
      auto z = random_values(samples * dim, 1), t = random_values(dim, 2);
      std::vector<float> out(samples * dim, NAN);
      purify_cos(view(z, {samples, dim}, kFloat32), view(t, {dim}, kFloat32),
                 view(out, {samples, dim}, kFloat32), {11, 30.0});
      CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
    }
  }
}

struct Problem {
  std::vector<float> embeddings, classes, null_text, null_scores;
  std::vector<int32_t> indices;
  std::vector<float> probabilities, logits;

  Problem(int64_t n, int64_t k, int64_t dim, int64_t top_k)
      : embeddings(random_values(n * dim, 1)),
        classes(random_values(k * dim, 2)),
        null_text(random_values(dim, 3)),
        null_scores(random_values(k, 4)),
        indices(n * top_k, -1),
        probabilities(n * top_k, NAN),
        logits(n * k, NAN) {}
};

void run_classify(Problem& p, int64_t n, int64_t k, int64_t dim, int64_t top_k, int64_t steps) {
  const ClassifyInputs inputs{
      view(p.embeddings, {n, dim}, kFloat32), view(p.classes, {k, dim}, kFloat32),
      view(p.null_text, {dim}, kFloat32), view(p.null_scores, {k}, kFloat32)};
  ClassifyOutputs outputs{view(p.indices, {n, top_k}, kInt32),
                          view(p.probabilities, {n, top_k}, kFloat32),
                          view(p.logits, {n, k}, kFloat32)};
  const ClassifyOptions options{0.5, 0.25, {steps, 0.5}, top_k};
  classify(inputs, outputs, options);
  const auto logits = p.logits;
  const auto indices = p.indices;
  outputs.logits.reset();
  classify(inputs, outputs, options);
  CHECK(p.logits == logits && p.indices == indices);
}

void test_classify() {
  for (int64_t dim : {1, 15, 16, 17, 33}) {
    for (int64_t k : {1, 2, 3, 4, 5, 7, 33, 130}) {
      for (int64_t n : {0, 1, 2, 3, 4, 5, 65}) {
        const int64_t top_k = std::min<int64_t>(k, 5);
        Problem p(n, k, dim, top_k);
        run_classify(p, n, k, dim, top_k, dim % 3);
        for (int32_t index : p.indices) CHECK(index >= 0 && index < k);
        for (float value : p.probabilities) CHECK(value >= 0 && value <= 1);
      }
    }
  }
}

// Just enough work for two threads: split over the classes, then over the samples.
void test_classify_with_threads() {
  const int64_t dim = 512;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 66000}, {3, 22000}, {66, 1000}}) {
    Problem p(n, k, dim, 5);
    run_classify(p, n, k, dim, 5, 2);
  }
}

void test_errors() {
  std::vector<float> z = {1, 2, 3, 4, NAN, 6}, t = {1, 1}, out(6);
  const auto purify = [&](int64_t rows) {
    return error_of([&] {
      purify_cos(view(z, {rows, 2}, kFloat32), view(t, {2}, kFloat32),
                 view(out, {rows, 2}, kFloat32), {1, 1.0});
    });
  };
  CHECK(purify(2).empty());
  CHECK(purify(3) == "[purify_cos] embedding 2 contains NaN or infinity");
  t = {0, 0};
  CHECK(purify(2) == "[purify_cos] null_text is zero");

  Problem p(40, 60000, 16, 1);  // enough work for two threads
  p.embeddings[33 * 16] = std::numeric_limits<float>::infinity();
  CHECK(error_of([&] { run_classify(p, 40, 60000, 16, 1, 0); }) ==
        "[classify] embedding 33 contains NaN or infinity");
  p.embeddings[33 * 16] = 0;
  p.classes[7] = NAN;
  CHECK(error_of([&] {
          run_classify(p, 40, 60000, 16, 1, 0);
        }).find("the logits of embedding 0 contain NaN") != std::string::npos);
}

void test_parallel_for() {
  for (int64_t count : {0, 1, 2, 7, 1000}) {
    for (int64_t threads : {1, 2, 5, 64}) {
      std::vector<int> visits(count, 0);
      std::atomic<int64_t> ranges{0};
      parallel_for(count, threads, [&](int64_t begin, int64_t end) {
        ++ranges;
        for (int64_t i = begin; i < end; ++i) ++visits[i];
      });
      CHECK(std::count(visits.begin(), visits.end(), 1) == count);
      CHECK(ranges == std::min(count, threads));
    }
  }
  const std::string error = error_of([] {
    parallel_for(100, 4, [](int64_t begin, int64_t) {
      if (begin > 0) throw std::runtime_error(std::to_string(begin));
    });
  });
  CHECK(error == "25");
}

// Concurrent callers share one queue, and their ranges call parallel_for again.
void test_parallel_for_from_many_threads() {
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int caller = 0; caller < 5; ++caller) {
    callers.emplace_back([&] {
      for (int turn = 0; turn < 50; ++turn) {
        parallel_for(100, 3, [&](int64_t begin, int64_t end) {
          parallel_for(end - begin, 2, [&](int64_t first, int64_t last) { sum += last - first; });
        });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 5 * 50 * 100);
}

}  // namespace
}  // namespace edgeclip

// With the argument "threads" only tests that use threads run: the thread sanitizer is slow.
int main(int argc, char** argv) {
  const bool all = argc < 2 || std::string(argv[1]) != "threads";
  edgeclip::test_parallel_for();
  edgeclip::test_parallel_for_from_many_threads();
  edgeclip::test_preprocess_flipped();
  edgeclip::test_classify_with_threads();
  edgeclip::test_errors();
  if (all) {
    edgeclip::test_preprocess();
    edgeclip::test_purify_cos();
    edgeclip::test_classify();
  }
  std::puts("ok");
}
