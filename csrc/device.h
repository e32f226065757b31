#ifndef EDGECLIP_DEVICE_H_
#define EDGECLIP_DEVICE_H_

#include <cstdint>
#include <memory>
#include <string>

// What a CUDA pipeline is made of, each owned and let go of by one object. Where edgeclip was built
// without CUDA, or there is no GPU, making one throws std::runtime_error.
namespace edgeclip::cuda {

struct DeviceInfo {
  std::string name;
  int index;
  int major;  // compute capability
  int minor;
  int64_t memory;  // bytes
  int64_t free_memory;
  int driver;  // the newest CUDA that the driver knows, as 13000
};

// Of the current device.
DeviceInfo device_info();

// Device memory, or pinned memory of the host, which the GPU reads and writes where it is. Zero.
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

// What was queued on a stream while it was captured, to be queued again in one go.
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
  // Between these two the stream only takes notes of what this thread queues.
  void begin_capture() const;
  std::unique_ptr<Graph> end_capture() const;
  void abandon_capture() const noexcept;

 private:
  uintptr_t handle_ = 0;
};

// A point in a stream's work, for timing.
class Event {
 public:
  Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event();

  void record(uintptr_t stream) const;
  // Waits for this one.
  double milliseconds_since(const Event& earlier) const;

 private:
  void* event_ = nullptr;
};

// Waits for all that was queued on a stream.
void synchronize(uintptr_t stream);

// Queues a copy between any two of device, pinned and other memory.
void copy(void* to, const void* from, int64_t bytes, uintptr_t stream);

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_DEVICE_H_
