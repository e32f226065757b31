#ifndef EDGECLIP_TESTS_CUDA_FP16_H_
#define EDGECLIP_TESTS_CUDA_FP16_H_

#include <cmath>

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float size = exponent == 0   ? std::ldexp(static_cast<float>(fraction), -24)
                     : exponent < 31 ? std::ldexp(1024.0f + fraction, exponent - 25)
                     : fraction == 0 ? INFINITY
                                     : NAN;
  return value.bits & 0x8000 ? -size : size;
}

// Rounds to nearest, ties to even, as nearbyint does.
inline __half __float2half_rn(float value) {
  const unsigned sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  unsigned bits = 0x7e00;  // NaN
  if (size >= 65520.0f) {
    bits = 0x7c00;
  } else if (size < 0x1p-14f) {
    bits = static_cast<unsigned>(std::nearbyint(size * 0x1p24f));
  } else if (size == size) {
    const int exponent = std::ilogb(size);
    const float fraction = std::nearbyint(std::ldexp(size, 10 - exponent));  // 1024 to 2048
    bits = ((exponent + 15) << 10) + static_cast<unsigned>(fraction) - 1024;
  }
  return {static_cast<unsigned short>(sign | bits)};
}

#endif  // EDGECLIP_TESTS_CUDA_FP16_H_
