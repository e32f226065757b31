#ifndef EDGECLIP_CUDA_ERROR_H_
#define EDGECLIP_CUDA_ERROR_H_

#include <stdexcept>

namespace edgeclip::cuda {

// A failed CUDA call, a missing GPU, or a CUDA operation in a build without CUDA.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_ERROR_H_
