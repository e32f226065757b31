#include <stdexcept>
#include <string>

#include "csrc/device.h"
#include "csrc/ops.h"

namespace edgeclip::cuda {
namespace {

[[noreturn]] void refuse(const char* op, const char* because = "got a CUDA tensor, but ") {
  throw std::runtime_error("[" + std::string(op) + "] " + because +
                           "edgeclip was built without CUDA (EDGECLIP_CUDA=OFF)");
}

}  // namespace

bool built() { return false; }

void preprocess(const TensorView&, const TensorView&, const PreprocessOptions&,
                const CudaOptions&) {
  refuse("preprocess");
}

void purify_cos(const TensorView&, const TensorView&, const TensorView&, const PurifyOptions&,
                const CudaOptions&) {
  refuse("purify_cos");
}

void classify(const ClassifyInputs&, const ClassifyOutputs&, const ClassifyOptions&,
              const ClassifySizes&, const CudaOptions&) {
  refuse("classify");
}

int64_t preprocess_workspace(const TensorView&, const TensorView&, const PreprocessOptions&) {
  refuse("preprocess_workspace", "");
}

int64_t classify_workspace(const ClassifySizes&) { refuse("classify_workspace", ""); }

// None of these is ever made, so what they can do is never asked for.
DeviceInfo device_info() { refuse("cuda", ""); }
void copy(void*, const void*, int64_t, uintptr_t) { refuse("cuda", ""); }
void synchronize(uintptr_t) { refuse("cuda", ""); }
Memory::Memory(int64_t, bool) { refuse("cuda", ""); }
Memory::~Memory() = default;
Graph::~Graph() = default;
void Graph::launch(uintptr_t) const {}
Stream::Stream() { refuse("cuda", ""); }
Stream::~Stream() = default;
void Stream::begin_capture() const {}
std::unique_ptr<Graph> Stream::end_capture() const { return nullptr; }
void Stream::abandon_capture() const noexcept {}
Event::Event() { refuse("cuda", ""); }
Event::~Event() = default;
void Event::record(uintptr_t) const {}
double Event::milliseconds_since(const Event&) const { return 0.0; }

}  // namespace edgeclip::cuda
