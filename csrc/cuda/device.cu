#include <cstring>
#include <string>

#include "csrc/cuda/check.cuh"
#include "csrc/device.h"

namespace edgeclip::cuda {
namespace {

constexpr const char* kOp = "cuda";

cudaStream_t as_stream(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

}  // namespace

DeviceInfo device_info() {
  int device = 0, driver = 0;
  check(cudaGetDevice(&device), kOp, "cudaGetDevice", "");
  check(cudaDriverGetVersion(&driver), kOp, "cudaDriverGetVersion", "");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), kOp, "cudaGetDeviceProperties", "");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), kOp, "cudaMemGetInfo", "");
  return {properties.name,
          device,
          properties.major,
          properties.minor,
          static_cast<int64_t>(total),
          static_cast<int64_t>(free),
          driver};
}

Memory::Memory(int64_t bytes, bool pinned) : bytes_(bytes), pinned_(pinned) {
  const std::string argument = std::to_string(bytes) + " bytes";
  const auto size = static_cast<size_t>(bytes > 0 ? bytes : 1);
  if (pinned) {
    check(cudaHostAlloc(&data_, size, cudaHostAllocMapped), kOp, "cudaHostAlloc", argument.c_str());
    std::memset(data_, 0, size);
    return;
  }
  check(cudaMalloc(&data_, size), kOp, "cudaMalloc", argument.c_str());
  // Finish before any stream can use the memory. Synchronize the default stream only: another
  // thread may be capturing another stream.
  cudaError_t error = cudaMemset(data_, 0, size);
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  if (error != cudaSuccess) cudaFree(data_);
  check(error, kOp, "cudaMemset", argument.c_str());
}

// Destructors ignore errors: these would come from earlier work.
Memory::~Memory() { static_cast<void>(pinned_ ? cudaFreeHost(data_) : cudaFree(data_)); }

Graph::~Graph() {
  static_cast<void>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_)));
}

void Graph::launch(uintptr_t stream) const {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), as_stream(stream)), kOp,
        "cudaGraphLaunch", "");
}

Stream::Stream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), kOp, "cudaStreamCreate", "");
  handle_ = reinterpret_cast<uintptr_t>(stream);
}

Stream::~Stream() { static_cast<void>(cudaStreamDestroy(as_stream(handle_))); }

void synchronize(uintptr_t stream) {
  check(cudaStreamSynchronize(as_stream(stream)), kOp, "cudaStreamSynchronize", "");
}

void Stream::begin_capture() const {
  check(cudaStreamBeginCapture(as_stream(handle_), cudaStreamCaptureModeThreadLocal), kOp,
        "cudaStreamBeginCapture", "");
}

std::unique_ptr<Graph> Stream::end_capture() const {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(as_stream(handle_), &graph), kOp, "cudaStreamEndCapture", "");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiateWithFlags(&executable, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  check(error, kOp, "cudaGraphInstantiate", "");
  return std::make_unique<Graph>(executable);
}

void Stream::abandon_capture() const noexcept {
  cudaGraph_t graph = nullptr;
  if (cudaStreamEndCapture(as_stream(handle_), &graph) == cudaSuccess) {
    static_cast<void>(cudaGraphDestroy(graph));
  }
  static_cast<void>(cudaGetLastError());
}

Event::Event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreate(&event), kOp, "cudaEventCreate", "");
  event_ = event;
}

Event::~Event() { static_cast<void>(cudaEventDestroy(static_cast<cudaEvent_t>(event_))); }

void Event::record(uintptr_t stream) const {
  check(cudaEventRecord(static_cast<cudaEvent_t>(event_), as_stream(stream)), kOp,
        "cudaEventRecord", "");
}

double Event::milliseconds_since(const Event& earlier) const {
  const auto event = static_cast<cudaEvent_t>(event_);
  check(cudaEventSynchronize(event), kOp, "cudaEventSynchronize", "");
  float elapsed = 0;
  check(cudaEventElapsedTime(&elapsed, static_cast<cudaEvent_t>(earlier.event_), event), kOp,
        "cudaEventElapsedTime", "");
  return elapsed;
}

void copy(void* to, const void* from, int64_t bytes, uintptr_t stream) {
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, as_stream(stream)),
        kOp, "cudaMemcpyAsync", "");
}

}  // namespace edgeclip::cuda
