#include <stdexcept>
#include <string>

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

}  // namespace edgeclip::cuda
