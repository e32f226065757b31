// The subset of CUDA that csrc/cuda uses, emulated on the host: tests run the kernels' own sources
// without a GPU, and under the sanitizers. CUDA threads are std::threads, a few blocks run at a
// time, and device memory is host memory. Slow, and for tests only.
#ifndef EDGECLIP_TESTS_CUDA_RUNTIME_H_
#define EDGECLIP_TESTS_CUDA_RUNTIME_H_

#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

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

// Index of the __syncthreads() of each block at which no thread waits; -1: none. Tests use it to
// plant a missing barrier.
extern int skipped_barrier;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Returns the bits that lane `source` passed; every lane of the warp must call it.
uint64_t exchange(uint64_t bits, int source);
int lane();

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
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
inline void __threadfence() {}  // the shim's atomics are sequentially consistent

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
  std::memcpy(&value, from, sizeof(T));  // kernels load 16 bytes of any type
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

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
};
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

// Queued work runs when the stream is synchronized; a capture records it instead.
struct CUgraph_st {
  std::vector<std::function<void()>> work;
};
struct CUstream_st {
  CUgraph_st* captured = nullptr;
  std::recursive_mutex busy;
  std::deque<std::function<void()>> pending;
};
struct CUevent_st {
  std::chrono::steady_clock::time_point time;
};
using cudaStream_t = CUstream_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraph_st*;
using cudaEvent_t = CUevent_st*;

namespace shim {
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);
}

template <typename Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  const bool fits = grid.x >= 1 && grid.y >= 1 && grid.x <= 0x7fffffffu && grid.y <= 0xffffu &&
                    block.x >= 1 && block.x <= 1024 && shared_bytes <= 48 << 10;
  if (!fits) return cudaErrorInvalidConfiguration;
  const Params params = *static_cast<Params*>(arguments[0]);
  return shim::enqueue(stream,
                       [=] { shim::run(grid, block, shared_bytes, [&] { kernel(params); }); });
}

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
inline constexpr unsigned cudaHostAllocMapped = 2, cudaStreamNonBlocking = 1;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);

cudaError_t cudaMalloc(void** data, size_t size);
cudaError_t cudaFree(void* data);
cudaError_t cudaHostAlloc(void** data, size_t size, unsigned flags);
cudaError_t cudaFreeHost(void* data);
cudaError_t cudaMemset(void* data, int value, size_t size);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                            cudaStream_t stream);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable);
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream);

cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end);

// Exported for Python: the tests' fake TensorRT queues its work with it.
extern "C" __attribute__((visibility("default"))) cudaError_t
cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* data);

#endif  // EDGECLIP_TESTS_CUDA_RUNTIME_H_
