#ifndef EDGECLIP_MATH_H_
#define EDGECLIP_MATH_H_

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define EDGECLIP_HD __host__ __device__
#else
#define EDGECLIP_HD
#endif

namespace edgeclip {

// Smallest sine between an embedding and the null text at which purification moves the embedding.
// Below it float32 rounding (a turn of 1e-7) blurs the plane of the two, so no tangent is defined.
inline constexpr double kMinSine = 1e-5;

// Coefficients of the purified unit vector: u_N = a u_0 + b t, for unit vectors u_0 and t.
struct PlaneRotation {
  double a = 1.0;
  double b = 0.0;
};

// CLIPure-Cos (Zhang et al., ICLR 2025, arXiv 2502.18176), computed from the cosine of u_0 and t.
// Each step u <- (u + eta w) / sqrt(1 + eta^2), with w the unit tangent at u towards the null text
// t, rotates u by atan(eta) within the plane of u_0 and t. In that plane u has two coordinates: its
// cosine to t, and its signed sine, positive on the side of u_0.
EDGECLIP_HD inline PlaneRotation rotate_towards_null_text(double cosine, int64_t steps,
                                                          double step_size) {
  const double initial_sine = std::sqrt(std::fmax(0.0, (1.0 - cosine) * (1.0 + cosine)));
  if (initial_sine < kMinSine) return {};
  const double length = std::hypot(1.0, step_size);
  const double cos_step = 1.0 / length;
  const double sin_step = step_size / length;
  double c = cosine;
  double s = initial_sine;
  for (int64_t step = 0; step < steps; ++step) {
    const double distance = std::fabs(s);
    if (distance < kMinSine) break;
    const double turned = distance * cos_step - c * sin_step;
    c = c * cos_step + distance * sin_step;
    s = s < 0.0 ? -turned : turned;
  }
  const double a = s / initial_sine;
  return {a, c - a * cosine};
}

}  // namespace edgeclip

#endif  // EDGECLIP_MATH_H_
