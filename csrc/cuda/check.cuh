#ifndef EDGECLIP_CUDA_CHECK_CUH_
#define EDGECLIP_CUDA_CHECK_CUH_

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace edgeclip::cuda {

// Throws std::runtime_error that names the operation, the call, what it was of, and CUDA's error.
inline void check(cudaError_t error, const char* op, const char* call, const char* of) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or somebody else's next check would report it again
  throw std::runtime_error("[" + std::string(op) + "] " + call + "(" + of +
                           "): " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// A kernel of one parameter, launched without the <<<>>> that only nvcc can parse. What a launch
// itself reports is checked here; an error within the kernel shows at the caller's synchronisation.
template <typename Params>
void launch(const char* op, const char* name, void (*kernel)(Params), dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, Params params) {
  void* arguments[] = {&params};
  check(cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream), op,
        "cudaLaunchKernel", name);
}

// The block's dynamic shared memory. All shared memory is taken from it, none declared in place,
// so that the test's shim can give every block its own.
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
