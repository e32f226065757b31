#include "csrc/arrays.h"

#include <dlpack/dlpack.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/ops.h"

namespace py = pybind11;

namespace edgeclip {
namespace {

std::string type_name(const py::handle& object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

bool is_native(char byte_order) {
  const uint16_t one = 1;
  const bool little = *reinterpret_cast<const char*>(&one) == 1;
  return byte_order != (little ? '>' : '<');
}

std::vector<int64_t> dense_strides(const std::vector<int64_t>& shape, int64_t bytes) {
  std::vector<int64_t> strides(shape.size());
  for (size_t axis = shape.size(); axis-- > 0; bytes *= shape[axis]) strides[axis] = bytes;
  return strides;
}

TensorView view_numpy(const py::array& array) {
  const py::dtype dtype = array.dtype();
  TensorView view;
  view.data = const_cast<void*>(array.data());
  view.dtype = {dtype.kind(), static_cast<int>(dtype.itemsize()), is_native(dtype.byteorder())};
  view.shape.assign(array.shape(), array.shape() + array.ndim());
  view.strides.assign(array.strides(), array.strides() + array.ndim());
  view.writable = array.writeable();
  return view;
}

// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
TensorView view_cuda(const py::dict& interface) {
  const auto typestr = interface["typestr"].cast<std::string>();
  const auto data = interface["data"].cast<std::pair<uintptr_t, bool>>();
  TensorView view;
  view.device = Device::kCuda;
  view.data = reinterpret_cast<void*>(data.first);
  view.writable = !data.second;
  view.dtype = {typestr.at(1), std::stoi(typestr.substr(2)), is_native(typestr.at(0))};
  view.shape = interface["shape"].cast<std::vector<int64_t>>();
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    view.strides = interface["strides"].cast<std::vector<int64_t>>();
  } else {
    view.strides = dense_strides(view.shape, view.dtype.bytes);
  }
  return view;
}

char kind_of(uint8_t code) {
  switch (code) {
    case kDLInt:
      return 'i';
    case kDLUInt:
      return 'u';
    case kDLFloat:
      return 'f';
    case kDLComplex:
      return 'c';
    case kDLBool:
      return 'b';
    default:
      return 'V';  // NumPy's kind for opaque data
  }
}

bool is_cuda(int device_type) { return device_type == kDLCUDA || device_type == kDLCUDAManaged; }

// Throws py::type_error with the end of a message that begins "[op] expected NAME".
TensorView view_tensor(const DLTensor& tensor, bool writable) {
  TensorView view;
  const auto type = tensor.device.device_type;
  if (is_cuda(type)) {
    view.device = Device::kCuda;
  } else if (type != kDLCPU && type != kDLCUDAHost) {
    throw py::type_error("in CPU or CUDA memory, got DLPack device type " + std::to_string(type));
  }
  if (view.device == Device::kCuda && tensor.device.device_id != 0) {
    throw py::type_error("on GPU 0, got GPU " + std::to_string(tensor.device.device_id) +
                         ": choose a GPU with CUDA_VISIBLE_DEVICES");
  }
  view.pinned = type == kDLCUDAHost;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.writable = writable;
  view.dtype = {tensor.dtype.lanes == 1 ? kind_of(tensor.dtype.code) : 'V', tensor.dtype.bits / 8};
  view.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  view.strides = dense_strides(view.shape, view.dtype.bytes);
  for (int axis = 0; tensor.strides != nullptr && axis < tensor.ndim; ++axis) {
    view.strides[axis] = tensor.strides[axis] * view.dtype.bytes;
  }
  return view;
}

// https://data-apis.org/array-api/latest/API_specification/generated/array_api.array.__dlpack__.html
py::object dlpack_capsule(const py::object& object, uintptr_t stream) {
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  py::dict arguments;
  if (is_cuda(device.first)) {
    arguments["stream"] = stream == 0 ? 1 : stream;  // DLPack numbers the default stream 1
  }
  const py::object produce = object.attr("__dlpack__");
  try {
    return produce(**arguments, py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return produce(**arguments);  // producer predates DLPack 1.0
}

// The capsule is not consumed: the view owns it, and its destructor calls the deleter.
TensorView view_dlpack(const py::object& object, uintptr_t stream) {
  const py::object capsule = dlpack_capsule(object, stream);
  PyObject* const handle = capsule.ptr();
  TensorView view;
  if (PyCapsule_IsValid(handle, "dltensor_versioned")) {
    const auto* managed = static_cast<const DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(handle, "dltensor_versioned"));
    if (managed->version.major != DLPACK_MAJOR_VERSION) {
      throw py::type_error("of DLPack version " + std::to_string(DLPACK_MAJOR_VERSION) +
                           ", got version " + std::to_string(managed->version.major));
    }
    view = view_tensor(managed->dl_tensor, (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) == 0);
  } else if (PyCapsule_IsValid(handle, "dltensor")) {
    const auto* managed =
        static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(handle, "dltensor"));
    view = view_tensor(managed->dl_tensor, true);
  } else {
    throw py::type_error("to return a DLPack capsule from __dlpack__, got " + type_name(capsule));
  }
  view.owner = std::make_shared<py::object>(capsule);
  return view;
}

}  // namespace

TensorView view_of(const char* op, const char* name, const py::object& object, uintptr_t stream) {
  if (py::isinstance<py::array>(object)) {
    return view_numpy(py::reinterpret_borrow<py::array>(object));
  }
  if (py::hasattr(object, "__cuda_array_interface__")) {
    return view_cuda(object.attr("__cuda_array_interface__").cast<py::dict>());
  }
  const std::string expected = "[" + std::string(op) + "] expected " + name + " ";
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    try {
      return view_dlpack(object, stream);
    } catch (const py::type_error& error) {
      throw py::type_error(expected + error.what());
    }
  }
  throw py::type_error(expected +
                       "to be a NumPy array, or to have __cuda_array_interface__ or __dlpack__, "
                       "got " +
                       type_name(object));
}

std::optional<TensorView> optional_view_of(const char* op, const char* name,
                                           const py::object& object, uintptr_t stream) {
  if (object.is_none()) return std::nullopt;
  return view_of(op, name, object, stream);
}

}  // namespace edgeclip
