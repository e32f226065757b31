// Prints results of the operations, for tests that compare machines: first the instruction set,
// then one line per result with its name and values.

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "csrc/ops.h"
#include "tests/csrc/testing.h"

namespace edgeclip {
namespace {

void print(const char* name, const std::vector<float>& values) {
  std::printf("%s", name);
  for (float value : values) std::printf(" %.9g", value);
  std::printf("\n");
}

// Returns values that are equal on all machines; std::normal_distribution depends on the math
// library.
std::vector<float> portable_values(int64_t count) {
  std::vector<float> values;
  for (uint8_t byte : random_pixels(count)) values.push_back(byte / 128.0f - 1.0f);
  return values;
}

void print_preprocess(int64_t height, int64_t width, Interpolation interpolation) {
  auto pixels = random_pixels(height * width * 3);
  const TensorView image = view(pixels, {height, width, 3}, kUint8);
  for (Resize resize : {Resize::kShortest, Resize::kLongest, Resize::kSquash}) {
    std::vector<float> out(3 * 17 * 24, NAN);
    preprocess(image, view(out, {3, 17, 24}, kFloat32),
               {{0.5f, 0.4f, 0.3f}, {0.2f, 0.3f, 0.4f}, resize, interpolation, 7, 3});
    print("preprocess", out);
  }
}

void print_classify(int64_t n, int64_t k, int64_t dim) {
  auto z = portable_values(n * dim), w = portable_values(k * dim), t = portable_values(dim);
  std::vector<float> purified(n * dim), moved(n * dim), q(k), logits(n * k), probabilities(n * k);
  std::vector<int32_t> indices(n * k);
  for (int64_t c = 0; c < k; ++c) q[c] = w[c * dim] / 8;
  for (float& value : w) value /= static_cast<float>(dim);
  const TensorView embeddings = view(z, {n, dim}, kFloat32);
  const TensorView null_text = view(t, {dim}, kFloat32);
  purify_cos(embeddings, null_text, view(purified, {n, dim}, kFloat32), {3, 0.3});
  print("purify_cos", purified);
  polar_step(embeddings, view(purified, {n, dim}, kFloat32), view(moved, {n, dim}, kFloat32), 0.5);
  print("polar_step", moved);
  classify({embeddings, view(w, {k, dim}, kFloat32), null_text, view(q, {k}, kFloat32)},
           {view(indices, {n, k}, kInt32), view(probabilities, {n, k}, kFloat32),
            view(logits, {n, k}, kFloat32)},
           {2.0, 0.25, {3, 0.3}, k});
  print("classify", logits);
  print("classify", probabilities);
}

}  // namespace
}  // namespace edgeclip

int main() {
  using namespace edgeclip;
  std::printf("simd %s\n", simd().c_str());
  const int64_t sizes[][2] = {{1, 1}, {33, 2049}, {2049, 33}, {97, 101}};
  for (const auto& size : sizes) {
    for (Interpolation interpolation : {Interpolation::kBicubic, Interpolation::kBilinear}) {
      print_preprocess(size[0], size[1], interpolation);
    }
  }
  for (int64_t dim : {2, 33, 2049}) {
    for (int64_t n : {1, 9}) print_classify(n, 33, dim);
  }
}
