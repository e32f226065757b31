#ifndef EDGECLIP_CUDA_CHECK_CUH_
#define EDGECLIP_CUDA_CHECK_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "csrc/cuda/error.h"

namespace edgeclip::cuda {

// Throws Error, naming the operation, the CUDA call and its argument, unless `error` is
// cudaSuccess.
inline void check(cudaError_t error, const char* op, const char* call, const char* argument) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // clears it, so that no later check reports it
  throw Error("[" + std::string(op) + "] " + call + "(" + argument +
              "): " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Launches a kernel of one parameter, without <<<>>>, which only nvcc can parse. Throws if the
// launch fails; an error inside the kernel appears when the caller synchronizes.
template <typename Params>
void launch(const char* op, const char* name, void (*kernel)(Params), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, Params params) {
  void* arguments[] = {&params};
  check(cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream), op,
        "cudaLaunchKernel", name);
}

// Returns the block's dynamic shared memory. Kernels declare no static shared memory, so that the
// tests' shim can give each block its own.
__device__ inline void* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return memory;
#else
  return shim_shared_memory();
#endif
}

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_CHECK_CUH_
