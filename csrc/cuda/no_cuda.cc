#include <string>

#include "csrc/cuda/error.h"
#include "csrc/device.h"
#include "csrc/ops.h"

namespace edgeclip::cuda {
namespace {

[[noreturn]] void fail(const char* op, const char* context = "") {
  throw Error("[" + std::string(op) + "] " + context +
              "edgeclip was built without CUDA: rebuild it with EDGECLIP_CUDA=ON");
}

[[noreturn]] void fail_tensor(const char* op) { fail(op, "got a CUDA tensor, but "); }

}  // namespace

bool built() { return false; }

void preprocess(const TensorView&, const TensorView&, const PreprocessOptions&,
                const CudaOptions&) {
  fail_tensor("preprocess");
}

void purify_cos(const TensorView&, const TensorView&, const TensorView&, const PurifyOptions&,
                const CudaOptions&) {
  fail_tensor("purify_cos");
}

void classify(const ClassifyInputs&, const ClassifyOutputs&, const ClassifyOptions&,
              const ClassifySizes&, const CudaOptions&) {
  fail_tensor("classify");
}

int64_t preprocess_workspace(const TensorView&, const TensorView&, const PreprocessOptions&) {
  fail("preprocess_workspace");
}

int64_t classify_workspace(const ClassifySizes&) { fail("classify_workspace"); }

// Constructors throw, so no other member function is ever called.
DeviceInfo device_info() { fail("cuda"); }
void copy(void*, const void*, int64_t, uintptr_t) { fail("cuda"); }
void synchronize(uintptr_t) { fail("cuda"); }
Memory::Memory(int64_t, bool) { fail("cuda"); }
Memory::~Memory() = default;
Graph::~Graph() = default;
void Graph::launch(uintptr_t) const {}
Stream::Stream() { fail("cuda"); }
Stream::~Stream() = default;
void Stream::begin_capture() const {}
std::unique_ptr<Graph> Stream::end_capture() const { return nullptr; }
void Stream::abandon_capture() const noexcept {}
Event::Event() { fail("cuda"); }
Event::~Event() = default;
void Event::record(uintptr_t) const {}
double Event::milliseconds_since(const Event&) const { return 0.0; }

}  // namespace edgeclip::cuda
