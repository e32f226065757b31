#ifndef EDGECLIP_CUDA_WORKSPACE_H_
#define EDGECLIP_CUDA_WORKSPACE_H_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "csrc/ops.h"

namespace edgeclip::cuda {

// Divides the caller's scratch memory. Operations allocate nothing and keep no state between calls,
// so CUDA graphs, whose replays need memory at fixed addresses, can capture them.
class Workspace {
 public:
  // Measures only: take() returns nullptr, and bytes() the total.
  Workspace() = default;

  Workspace(const char* op, const CudaOptions& options, int64_t bytes) {
    const TensorView* view = options.workspace ? &*options.workspace : nullptr;
    const bool valid = view != nullptr && view->device == Device::kCuda && view->writable &&
                       view->dtype == kUint8 && view->shape.size() == 1 && view->strides[0] == 1 &&
                       view->shape[0] >= bytes &&
                       reinterpret_cast<uintptr_t>(view->data) % kAlignment == 0;
    if (!valid) {
      throw std::invalid_argument("[" + std::string(op) + "] expected workspace of at least " +
                                  std::to_string(bytes) + " bytes of uint8 in CUDA memory, " +
                                  "zero-initialized and aligned to 16 bytes");
    }
    base_ = view->as<char>();
  }

  template <typename T>
  T* take(int64_t count) {
    char* const block = base_ == nullptr ? nullptr : base_ + bytes_;
    const int64_t size = count * static_cast<int64_t>(sizeof(T));
    bytes_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(block);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kAlignment = 16;

  char* base_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_WORKSPACE_H_
