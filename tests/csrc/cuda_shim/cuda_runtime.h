// As much of CUDA as csrc/cuda needs, on the host, so that the very same sources run in tests where
// there is no GPU, under the sanitizers too. A CUDA thread is a std::thread, a barrier a barrier; a
// few blocks run at a time. Not for speed, nor for anything but tests.
#ifndef EDGECLIP_TESTS_CUDA_RUNTIME_H_
#define EDGECLIP_TESTS_CUDA_RUNTIME_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

extern thread_local dim3 threadIdx, blockIdx, gridDim;

namespace shim {

inline constexpr int kWarpSize = 32;

// The barrier that every thread passes at its n-th __syncthreads() of each block without waiting;
// -1: none. It is how the tests plant a missing one.
extern int skipped_barrier;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What `lane` gave, in bits, where every lane of the warp gives something.
uint64_t exchange(uint64_t mine, int lane);
int lane();

template <typename T>
T exchange(T mine, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof(T));
  bits = exchange(bits, lane);
  std::memcpy(&mine, &bits, sizeof(T));
  return mine;
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace shim

void* shim_shared_memory();
void __syncthreads();
void __syncwarp();
inline void __threadfence() {}  // the atomics of the shim are sequentially consistent

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return shim::exchange(value, shim::lane() ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return shim::exchange(value, lane);
}
template <typename T>
T __ldg(const T* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));  // kernels load 16 bytes of whatever there is
  return value;
}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}

inline unsigned __float_as_uint(float x) { return shim::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return shim::bits_as<float>(x); }
inline double __longlong_as_double(long long x) { return shim::bits_as<double>(x); }

template <typename T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <typename T>
T max(T x, T y) {
  return x < y ? y : x;
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

template <typename Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const bool fits = grid.x >= 1 && grid.y >= 1 && grid.x <= 0x7fffffffu && grid.y <= 0xffffu &&
                    block.x >= 1 && block.x <= 1024 && shared_bytes <= 48 << 10;
  if (!fits) return cudaErrorInvalidConfiguration;
  const Params& params = *static_cast<Params*>(arguments[0]);
  shim::run(grid, block, shared_bytes, [&] { kernel(params); });
  return cudaSuccess;
}

#endif  // EDGECLIP_TESTS_CUDA_RUNTIME_H_
