#include <cstdint>

#include "csrc/cpu/rows.h"
#include "csrc/math.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace edgeclip::cpu {
namespace {

constexpr double kValuesPerThread = 1 << 22;

// out = a z + b (|z| / |t|) t: the purified row, with the norm of z.
void combine(const float* z, double a, const float* t, double b, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; ++i) {
    out[i] = static_cast<float>(a * static_cast<double>(z[i]) + b * static_cast<double>(t[i]));
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

}  // namespace edgeclip::cpu
