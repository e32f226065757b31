#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "csrc/cpu/rows.h"
#include "csrc/math.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace edgeclip::cpu {
namespace {

constexpr double kValuesPerThread = 1 << 22;

void combine(const float* z, double a, const float* t, double b, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) {
    out[i] = static_cast<float>(a * static_cast<double>(z[i]) + b * static_cast<double>(t[i]));
  }
}

// out = |z| normalize(z / |z| - eta g / |g|). A zero gradient has no direction, and z and the step
// may cancel: both leave z unchanged.
void descend(const float* z, double norm, const float* g, double g_norm, double eta, int64_t dim,
             float* out) {
  // Divide both terms by the larger one, so that no step size overflows.
  const double length = std::fmax(1.0, eta);
  const double along = g_norm > 0 ? eta / length / g_norm : 0.0;
  double square = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const double value = z[i] / norm / length - along * g[i];
    square += value * value;
  }
  const bool unchanged = along == 0.0 || square < kMinSine * kMinSine;
  const double scale = unchanged ? 1.0 : norm / std::sqrt(square);
  for (int64_t i = 0; i < dim; ++i) {
    const double value = unchanged ? z[i] : (z[i] / norm / length - along * g[i]) * scale;
    out[i] = static_cast<float>(value);
  }
}

}  // namespace

void purify_cos(const TensorView& embeddings, const TensorView& null_text, const TensorView& out,
                const PurifyOptions& options) {
  const int64_t samples = embeddings.shape[0], dim = embeddings.shape[1];
  const float* t = null_text.as<const float>();
  const double t_norm = checked_norm({"purify_cos", "null_text"}, t, dim);
  const double values = static_cast<double>(samples) * static_cast<double>(dim);
  parallel_for(
      samples, automatic_threads(values, kValuesPerThread), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float* z = embeddings.as<const float>() + i * dim;
          const double norm = checked_norm({"purify_cos", "embedding", i}, z, dim);
          const PlaneRotation rotation = rotate_towards_null_text(dot(z, t, dim) / (norm * t_norm),
                                                                  options.steps, options.step_size);
          combine(z, rotation.a, t, rotation.b * norm / t_norm, dim, out.as<float>() + i * dim);
        }
      });
}

void polar_step(const TensorView& embeddings, const TensorView& gradients, const TensorView& out,
                double step_size) {
  const int64_t samples = embeddings.shape[0], dim = embeddings.shape[1];
  for (int64_t i = 0; i < samples; ++i) {
    const float* z = embeddings.as<const float>() + i * dim;
    const float* g = gradients.as<const float>() + i * dim;
    const double g_norm = std::sqrt(dot(g, g, dim));
    if (!std::isfinite(g_norm)) {
      throw std::invalid_argument("[polar_step] gradient " + std::to_string(i) +
                                  " contains NaN or infinity");
    }
    descend(z, checked_norm({"polar_step", "embedding", i}, z, dim), g, g_norm, step_size, dim,
            out.as<float>() + i * dim);
  }
}

}  // namespace edgeclip::cpu
