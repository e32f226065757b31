// Helpers of the C++ tests.
#ifndef EDGECLIP_TESTS_TESTING_H_
#define EDGECLIP_TESTS_TESTING_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ops.h"

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

namespace edgeclip {

template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

template <typename T>
TensorView view(std::vector<T>& values, std::vector<int64_t> shape, DType dtype) {
  TensorView result;
  result.data = values.data();
  result.dtype = dtype;
  result.shape = std::move(shape);
  result.writable = true;
  int64_t stride = sizeof(T);
  result.strides.resize(result.shape.size());
  for (size_t axis = result.shape.size(); axis-- > 0;) {
    result.strides[axis] = stride;
    stride *= result.shape[axis];
  }
  return result;
}

inline std::vector<float> random_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

inline std::vector<uint8_t> random_pixels(int64_t count) {
  std::mt19937 generator(1);
  std::vector<uint8_t> values(count);
  for (uint8_t& value : values) value = static_cast<uint8_t>(generator());
  return values;
}

}  // namespace edgeclip

#endif  // EDGECLIP_TESTS_TESTING_H_
