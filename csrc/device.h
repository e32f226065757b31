#ifndef EDGECLIP_DEVICE_H_
#define EDGECLIP_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>

// Owners of CUDA resources; each destructor releases its resource. Constructors and functions throw
// cuda::Error if CUDA fails, there is no GPU, or edgeclip was built without CUDA.
namespace edgeclip::cuda {

struct DeviceInfo {
  std::string name;
  int index;
  int major;  // compute capability
  int minor;
  int64_t memory;  // bytes
  int64_t free_memory;
  int driver;  // newest CUDA version the driver supports; 13000 is 13.0
};

// Describes the current device.
DeviceInfo device_info();

// Zero-initialized device memory, or pinned host memory that the GPU reads and writes in place.
class Memory {
 public:
  Memory(int64_t bytes, bool pinned);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  bool pinned() const { return pinned_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
  bool pinned_;
};

// An executable CUDA graph: captured work that one launch replays.
class Graph {
 public:
  explicit Graph(void* executable) : executable_(executable) {}
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph();

  void launch(uintptr_t stream) const;

 private:
  void* executable_;
};

class Stream {
 public:
  Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();

  uintptr_t handle() const { return handle_; }
  // Between begin_capture and end_capture, work queued by this thread is recorded, not run.
  void begin_capture() const;
  std::unique_ptr<Graph> end_capture() const;
  void abandon_capture() const noexcept;

 private:
  uintptr_t handle_ = 0;
};

// A CUDA event, for timing.
class Event {
 public:
  Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  void record(uintptr_t stream) const;
  // Blocks until this event has happened.
  double milliseconds_since(const Event& earlier) const;

 private:
  void* event_ = nullptr;
};

// Blocks until all work queued on the stream is done.
void synchronize(uintptr_t stream);

// Queues a copy between any two addresses in device, pinned or pageable memory.
void copy(void* to, const void* from, int64_t bytes, uintptr_t stream);

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_DEVICE_H_
