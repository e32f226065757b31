#include <cstdint>

#include "csrc/cuda/check.cuh"
#include "csrc/cuda/purify.cuh"
#include "csrc/cuda/warp.cuh"
#include "csrc/ops.h"

namespace edgeclip::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;

struct PurifyJob {
  const void* embeddings;
  const float* null_text;
  void* out;
  int64_t samples;
  int64_t dim;
  PurifyOptions options;
};

// One warp per sample. A row for which the CPU path would throw becomes NaN.
template <typename T>
__global__ void __launch_bounds__(kThreads) purify_kernel(const PurifyJob job) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t sample =
      static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  if (sample >= job.samples) return;
  const T* z = static_cast<const T*>(job.embeddings) + sample * job.dim;
  T* out = static_cast<T*>(job.out) + sample * job.dim;
  const Purification p = purify(z, job.null_text, job.dim, job.options, lane);
  const double nan = __longlong_as_double(0x7ff8000000000000LL);
  const double a = p.valid ? p.rotation.a : nan;
  const double b = p.valid ? p.rotation.b * p.norm / p.null_norm : nan;
  for (int64_t i = lane; i < job.dim; i += kWarpSize) {
    const double x = to_float(z[i]), y = job.null_text[i];
    store(out + i, static_cast<float>(a * x + b * y));
  }
}

}  // namespace

bool built() { return true; }

void purify_cos(const TensorView& embeddings, const TensorView& null_text, const TensorView& out,
                const PurifyOptions& options, const CudaOptions& cuda) {
  const int64_t samples = embeddings.shape[0], dim = embeddings.shape[1];
  if (samples == 0) return;
  const PurifyJob job{embeddings.data, null_text.as<const float>(), out.data, samples, dim,
                      options};
  const auto kernel = embeddings.dtype == kFloat16 ? purify_kernel<__half> : purify_kernel<float>;
  launch("purify_cos", "purify_kernel", kernel,
         dim3(static_cast<unsigned>((samples + kWarps - 1) / kWarps)), dim3(kThreads), 0,
         reinterpret_cast<cudaStream_t>(cuda.stream), job);
}

}  // namespace edgeclip::cuda
