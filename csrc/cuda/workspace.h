#ifndef EDGECLIP_CUDA_WORKSPACE_H_
#define EDGECLIP_CUDA_WORKSPACE_H_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "csrc/ops.h"

namespace edgeclip::cuda {

// Scratch memory is the caller's. So no operation allocates, none keeps anything between calls, and
// all of them can be captured in a CUDA graph, whose replays must find the memory where it was.
class Workspace {
 public:
  // To learn the size: what is taken from it points nowhere.
  Workspace() = default;

  Workspace(const char* op, const CudaOptions& options, int64_t bytes) {
    const TensorView* view = options.workspace ? &*options.workspace : nullptr;
    const bool fits = view != nullptr && view->device == Device::kCuda && view->writable &&
                      view->dtype == kUint8 && view->shape.size() == 1 && view->strides[0] == 1 &&
                      view->shape[0] >= bytes &&
                      reinterpret_cast<uintptr_t>(view->data) % kAlignment == 0;
    if (!fits) {
      throw std::invalid_argument("[" + std::string(op) + "] expected workspace to be " +
                                  std::to_string(bytes) + " or more bytes of uint8 in CUDA memory" +
                                  ", zero at first and aligned to 16");
    }
    at_ = view->as<char>();
  }

  template <typename T>
  T* take(int64_t count) {
    char* const taken = at_ == nullptr ? nullptr : at_ + bytes_;
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(taken);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 16;

  char* at_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_WORKSPACE_H_
