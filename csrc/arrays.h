#ifndef EDGECLIP_ARRAYS_H_
#define EDGECLIP_ARRAYS_H_

#include <pybind11/pybind11.h>

#include <optional>

#include "csrc/ops.h"

namespace edgeclip {

// The memory of a Python array, without a copy: NumPy's, or a GPU's by __cuda_array_interface__ or
// DLPack. By DLPack its producer is told the stream that will read it; with the older interface
// what was queued elsewhere has to be done. Raises TypeError for anything else, naming `op` and
// `name`.
TensorView view_of(const char* op, const char* name, const pybind11::object& object,
                   uintptr_t stream = 0);
std::optional<TensorView> optional_view_of(const char* op, const char* name,
                                           const pybind11::object& object, uintptr_t stream = 0);

// Memory, streams, graphs and events: see csrc/device.h.
void bind_device(pybind11::module_& m);

}  // namespace edgeclip

#endif  // EDGECLIP_ARRAYS_H_
