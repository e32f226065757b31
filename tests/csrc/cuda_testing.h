// Helpers of cuda_test.cc: tensors and workspaces that count as the GPU's, and classification
// problems.
#ifndef EDGECLIP_TESTS_CUDA_TESTING_H_
#define EDGECLIP_TESTS_CUDA_TESTING_H_

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#include "csrc/ops.h"
#include "tests/csrc/testing.h"

namespace edgeclip {

template <typename T>
TensorView on_gpu(std::vector<T>& values, std::vector<int64_t> shape, DType dtype) {
  TensorView result = view(values, std::move(shape), dtype);
  result.device = Device::kCuda;
  return result;
}

// A zeroed workspace of exactly the given size, aligned as by cudaMalloc.
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

// Rounds values to the nearest float16, in place, and returns them as float16.
inline std::vector<__half> round_to_half(std::vector<float>& values) {
  std::vector<__half> halves;
  for (float& value : values) {
    halves.push_back(__float2half_rn(value));
    value = __half2float(halves.back());
  }
  return halves;
}

struct Result {
  std::vector<int32_t> indices;
  std::vector<float> probabilities, logits;

  bool operator==(const Result& other) const {
    return indices == other.indices && probabilities == other.probabilities &&
           logits == other.logits;
  }
  Result row(int64_t i, int64_t n) const {
    const auto slice = [&](const auto& all) {
      const auto size = static_cast<int64_t>(all.size()) / n;
      return std::decay_t<decltype(all)>(all.begin() + i * size, all.begin() + (i + 1) * size);
    };
    return {slice(indices), slice(probabilities), slice(logits)};
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

  // Uses float16 on the GPU from now on, and the same values in float32 on the CPU.
  void use_halves() {
    round_to_half(embeddings);
    half_weights = round_to_half(weights);
  }

  Result solve(Device device, int64_t first, int64_t count) {
    const int64_t top = std::min(options.top_k, k);
    Result result{std::vector<int32_t>(count * top, -7), std::vector<float>(count * top),
                  std::vector<float>(count * k)};
    const auto place = [&](TensorView tensor) {
      tensor.device = device;
      return tensor;
    };
    std::vector<float> samples(embeddings.begin() + first * d,
                               embeddings.begin() + (first + count) * d);
    ClassifyInputs inputs{
        place(view(samples, {count, d}, kFloat32)), place(view(weights, {k, d}, kFloat32)),
        place(view(null_text, {d}, kFloat32)), place(view(null_scores, {k}, kFloat32))};
    std::vector<__half> half_samples;
    if (device == Device::kCuda && !half_weights.empty()) {
      half_samples = round_to_half(samples);
      inputs.embeddings = on_gpu(half_samples, {count, d}, kFloat16);
      inputs.classes = on_gpu(half_weights, {k, d}, kFloat16);
    }
    const ClassifyOutputs outputs{place(view(result.indices, {count, top}, kInt32)),
                                  place(view(result.probabilities, {count, top}, kFloat32)),
                                  place(view(result.logits, {count, k}, kFloat32))};
    const Workspace workspace(classify_workspace(count, k));
    classify(inputs, outputs, options, workspace.options());
    return result;
  }
  Result solve(Device device) { return solve(device, 0, n); }

  int64_t n, k, d;
  std::vector<float> embeddings, weights, null_text, null_scores;
  std::vector<__half> half_weights;
  ClassifyOptions options{10.0, 0.25, {3, 0.4}, 5};
};

// Checks logits against the CPU's, up to rounding, and order and softmax against the logits
// themselves.
inline void check_result(const Result& got, const Result& expected, int64_t n, float tolerance) {
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

}  // namespace edgeclip

#endif  // EDGECLIP_TESTS_CUDA_TESTING_H_
