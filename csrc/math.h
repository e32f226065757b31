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

// Below this sine a float32 embedding does not determine the plane it spans with the null text
// (rounding alone turns it by 1e-7), so there is no tangent to follow.
inline constexpr double kMinSine = 1e-5;

// u_N = a u_0 + b t, for unit vectors u_0 and t.
struct PlaneRotation {
  double a = 1.0;
  double b = 0.0;
};

// CLIPure-Cos (Zhang et al., ICLR 2025, arXiv 2502.18176) without the embedding. Every step
// u <- (u + eta w) / sqrt(1 + eta^2), with w the unit tangent at u towards the null text t, turns u
// by atan(eta) within the plane of u_0 and t. There u is two numbers: its cosine to t, and its
// signed sine, positive on the side where u_0 lies.
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
