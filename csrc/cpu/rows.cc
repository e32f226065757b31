#include "csrc/cpu/rows.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "csrc/cpu/simd.h"

namespace edgeclip::cpu {
namespace {

[[noreturn]] void fail(const RowName& row, const char* problem) {
  const std::string index = row.index < 0 ? "" : " " + std::to_string(row.index);
  throw std::invalid_argument("[" + std::string(row.op) + "] " + row.name + index + problem);
}

template <Simd>
EDGECLIP_INLINE double dot_kernel(const float* x, const float* y, int64_t size) {
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      sums[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(y[i + lane]);
    }
  }
  for (; i < size; ++i) sums[0] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  double sum = 0.0;
  for (double lane : sums) sum += lane;
  return sum;
}

}  // namespace

EDGECLIP_SIMD_KERNEL(double, dot, (const float* x, const float* y, int64_t size), (x, y, size))

double checked_norm(const RowName& name, const float* row, int64_t size) {
  // Squares of float32 neither overflow nor underflow in double, so one sum detects every bad
  // value.
  const double squared = dot(row, row, size);
  if (!std::isfinite(squared)) fail(name, " contains NaN or infinity");
  if (squared == 0.0) fail(name, " is zero");
  return std::sqrt(squared);
}

}  // namespace edgeclip::cpu
