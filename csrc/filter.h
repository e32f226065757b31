#ifndef EDGECLIP_FILTER_H_
#define EDGECLIP_FILTER_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "csrc/math.h"
#include "csrc/ops.h"

// Filter weights of Pillow's 8-bit resampling, for the CPU and the GPU. Compile every file that
// includes this without floating-point contraction: a fused multiply-add would change the last bit
// of a weight, and thus pixels.
namespace edgeclip {

inline constexpr int kPrecisionBits = 32 - 8 - 2;  // 8 bits of pixel, 2 for overshoot of the sums
inline constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);

// One axis: `input` pixels are resized to `resized`; the output is their crop [first, first +
// count).
struct Axis {
  int64_t input;
  int64_t resized;
  int64_t first;
  int64_t count;
};

// Input pixels [begin, begin + length): the support of one output pixel.
struct Window {
  int64_t begin;
  int64_t length;
};

// The filter of one axis, widened for antialiasing when downscaling.
struct Resampling {
  Resampling(const Axis& axis, Interpolation interpolation)
      : cubic(interpolation == Interpolation::kBicubic),
        input(axis.input),
        first(axis.first),
        scale(static_cast<double>(axis.input) / static_cast<double>(axis.resized)) {
    const double filter_scale = std::max(scale, 1.0);
    support = (cubic ? 2.0 : 1.0) * filter_scale;
    inverse = 1.0 / filter_scale;
  }

  int64_t max_length() const {
    return std::min(static_cast<int64_t>(std::ceil(support)) * 2 + 1, input);
  }

  bool cubic;
  int64_t input;
  int64_t first;
  double scale;
  double support;
  double inverse;
};

EDGECLIP_HD inline double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

EDGECLIP_HD inline double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Returns the center of output pixel i, in input pixels.
EDGECLIP_HD inline double filter_center(const Resampling& filter, int64_t i) {
  return (static_cast<double>(filter.first + i) + 0.5) * filter.scale;
}

EDGECLIP_HD inline Window filter_window(const Resampling& filter, int64_t i) {
  const double center = filter_center(filter, i);
  const int64_t begin = static_cast<int64_t>(center - filter.support + 0.5);
  const int64_t end = static_cast<int64_t>(center + filter.support + 0.5);
  const int64_t clipped = begin < 0 ? 0 : begin;
  return {clipped, (end < filter.input ? end : filter.input) - clipped};
}

// Returns the weight of input pixel x before normalization by the sum over its window.
EDGECLIP_HD inline double filter_weight(const Resampling& filter, double center, int64_t x) {
  const double distance = (static_cast<double>(x) - center + 0.5) * filter.inverse;
  return filter.cubic ? bicubic(distance) : bilinear(distance);
}

EDGECLIP_HD inline int32_t to_fixed_point(double weight) {
  const double scaled = weight * (1 << kPrecisionBits);
  return static_cast<int32_t>(weight < 0 ? scaled - 0.5 : scaled + 0.5);
}

}  // namespace edgeclip

#endif  // EDGECLIP_FILTER_H_
