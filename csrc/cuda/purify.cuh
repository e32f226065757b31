#ifndef EDGECLIP_CUDA_PURIFY_CUH_
#define EDGECLIP_CUDA_PURIFY_CUH_

#include <cstdint>

#include "csrc/cuda/warp.cuh"
#include "csrc/math.h"
#include "csrc/ops.h"

namespace edgeclip::cuda {

// Norms of an embedding and the null text, and the rotation between them. `valid` is false where
// the CPU path would reject a norm.
struct Purification {
  double norm;
  double null_norm;
  PlaneRotation rotation;
  bool valid;
};

__device__ inline bool is_norm_square(double squared) {
  return squared > 0.0 && squared <= 1.7976931348623157e308;  // neither zero, NaN nor infinity
}

// Run by one warp; every lane gets the result. In double as on the CPU: near the null text a
// float32 cosine does not determine the sine. Without a null text only the norm is computed.
template <typename T>
__device__ Purification purify(const T* z, const float* null_text, int64_t dim,
                               const PurifyOptions& options, int lane) {
  double zz = 0.0, zt = 0.0, tt = 0.0;
  for (int64_t i = lane; i < dim; i += kWarpSize) {
    const double x = to_float(z[i]);
    const double y = null_text == nullptr ? 0.0 : null_text[i];
    zz += x * x;
    zt += x * y;
    tt += y * y;
  }
  zz = warp_reduce(zz, Sum());
  if (null_text == nullptr) return {sqrt(zz), 1.0, {}, is_norm_square(zz)};
  zt = warp_reduce(zt, Sum());
  tt = warp_reduce(tt, Sum());
  const double norm = sqrt(zz), null_norm = sqrt(tt);
  const PlaneRotation rotation =
      rotate_towards_null_text(zt / (norm * null_norm), options.steps, options.step_size);
  return {norm, null_norm, rotation, is_norm_square(zz) && is_norm_square(tt)};
}

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_PURIFY_CUH_
