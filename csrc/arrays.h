#ifndef EDGECLIP_ARRAYS_H_
#define EDGECLIP_ARRAYS_H_

#include <pybind11/pybind11.h>

#include <optional>

#include "csrc/ops.h"

namespace edgeclip {

// Views the memory of a Python array without a copy: NumPy, __cuda_array_interface__ or DLPack.
// A DLPack producer synchronizes with `stream`; with __cuda_array_interface__ the caller must have
// synchronized earlier work on the array. Raises TypeError, naming `op` and `name`, for any other
// object.
TensorView view_of(const char* op, const char* name, const pybind11::object& object,
                   uintptr_t stream = 0);
std::optional<TensorView> optional_view_of(const char* op, const char* name,
                                           const pybind11::object& object, uintptr_t stream = 0);

// Registers CudaError and the classes of csrc/device.h: memory, streams, graphs and events.
void bind_device(pybind11::module_& m);

}  // namespace edgeclip

#endif  // EDGECLIP_ARRAYS_H_
