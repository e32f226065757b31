#include <stdexcept>
#include <string>

#include "csrc/ops.h"

namespace edgeclip::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  throw std::runtime_error("[" + std::string(op) +
                           "] got a CUDA tensor, but edgeclip was built without CUDA "
                           "(EDGECLIP_CUDA=OFF)");
}

}  // namespace

bool built() { return false; }

void preprocess(const TensorView&, const TensorView&, const PreprocessOptions&) {
  refuse("preprocess");
}

void purify_cos(const TensorView&, const TensorView&, const TensorView&, const PurifyOptions&) {
  refuse("purify_cos");
}

void classify(const ClassifyInputs&, const ClassifyOutputs&, const ClassifyOptions&,
              const ClassifySizes&) {
  refuse("classify");
}

}  // namespace edgeclip::cuda
