// Memory, streams, graphs and events of the shim. As on a GPU, work queued on a stream runs later:
// here at the next synchronization. A capturing thread may neither allocate nor synchronize. The
// environment variable EDGECLIP_SHIM_NO_GPU emulates a machine without a GPU, and
// EDGECLIP_SHIM_NO_CAPTURE makes every capture fail.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>

namespace {

constexpr size_t kAlignment = 256;  // cudaMalloc's

thread_local cudaError_t last_error = cudaSuccess;
thread_local CUstream_st* capturing = nullptr;  // stream that this thread captures
thread_local bool is_invalidated = false;       // whether that capture has failed

std::mutex mutex;  // guards streams and allocations
std::set<CUstream_st*> streams;
std::map<const char*, size_t> allocations;

cudaError_t fail(cudaError_t error) { return last_error = error; }

bool has_gpu() { return std::getenv("EDGECLIP_SHIM_NO_GPU") == nullptr; }

// Returns whether `data` is in device or pinned memory; other memory may be freed before work runs.
bool is_allocated(const void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const char* const address = static_cast<const char*>(data);
  const auto next = allocations.upper_bound(address);
  if (next == allocations.begin()) return false;
  const auto& [begin, size] = *std::prev(next);
  return address < begin + size;
}

// Returns whether this thread is capturing, and if so invalidates the capture.
bool invalidate_capture() {
  if (capturing == nullptr) return false;
  is_invalidated = true;
  return true;
}

void run_pending(CUstream_st* stream) {
  const std::lock_guard<std::recursive_mutex> lock(stream->busy);
  while (!stream->pending.empty()) {
    const auto work = std::move(stream->pending.front());
    stream->pending.pop_front();
    work();
  }
}

void run_pending() {
  std::set<CUstream_st*> all;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    all = streams;
  }
  for (CUstream_st* stream : all) run_pending(stream);
}

cudaError_t allocate(void** data, size_t size) {
  if (!has_gpu()) return fail(cudaErrorNoDevice);
  if (invalidate_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  const size_t padded = (size + kAlignment - 1) / kAlignment * kAlignment;
  *data = std::aligned_alloc(kAlignment, padded);
  if (*data == nullptr) return fail(cudaErrorMemoryAllocation);
  std::memset(*data, 0xff, padded);  // NaN, if read as float
  const std::lock_guard<std::mutex> lock(mutex);
  allocations[static_cast<const char*>(*data)] = padded;
  return cudaSuccess;
}

}  // namespace

cudaError_t shim::enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr) {
    work();
  } else if (stream->captured != nullptr) {
    stream->captured->work.push_back(std::move(work));
  } else {
    const std::lock_guard<std::recursive_mutex> lock(stream->busy);
    stream->pending.push_back(std::move(work));
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    default:
      return "cudaErrorInvalidValue";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoDevice ? "no CUDA-capable device is detected" : "emulated error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return has_gpu() ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::strcpy(properties->name, "Emulated GPU");
  properties->major = 8;
  properties->minor = 7;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = size_t{4} << 30;
  *total = size_t{8} << 30;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, size_t size) { return allocate(data, size); }

cudaError_t cudaFree(void* data) {
  if (invalidate_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  run_pending();
  const std::lock_guard<std::mutex> lock(mutex);
  allocations.erase(static_cast<const char*>(data));
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, size_t size, unsigned) { return allocate(data, size); }

cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }

cudaError_t cudaMemset(void* data, int value, size_t size) {
  if (invalidate_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  std::memset(data, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  if (is_allocated(to) && is_allocated(from)) {
    return shim::enqueue(stream, [=] { std::memcpy(to, from, size); });
  }
  if (invalidate_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if (is_allocated(to)) {  // pageable source: read now, write later
    const std::shared_ptr<char[]> staged(new char[size]);
    std::memcpy(staged.get(), from, size);
    return shim::enqueue(stream, [=] { std::memcpy(to, staged.get(), size); });
  }
  if (stream != nullptr) run_pending(stream);
  std::memcpy(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (!has_gpu()) return fail(cudaErrorNoDevice);
  *stream = new CUstream_st;
  const std::lock_guard<std::mutex> lock(mutex);
  streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  run_pending(stream);
  const std::lock_guard<std::mutex> lock(mutex);
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (invalidate_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream != nullptr) run_pending(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr || stream->captured != nullptr) return fail(cudaErrorInvalidValue);
  stream->captured = new CUgraph_st;
  capturing = stream;
  is_invalidated = std::getenv("EDGECLIP_SHIM_NO_CAPTURE") != nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = std::exchange(stream->captured, nullptr);
  capturing = nullptr;
  if (*graph == nullptr) return fail(cudaErrorInvalidValue);
  if (!std::exchange(is_invalidated, false)) return cudaSuccess;
  delete std::exchange(*graph, nullptr);
  return fail(cudaErrorStreamCaptureInvalidated);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long) {
  *executable = new CUgraph_st(*graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return cudaGraphDestroy(executable);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return shim::enqueue(stream, [work = executable->work] {
    for (const auto& step : work) step();
  });
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return shim::enqueue(stream, [=] { event->time = std::chrono::steady_clock::now(); });
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
  run_pending();
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* data) {
  return shim::enqueue(stream, [=] { function(data); });
}
