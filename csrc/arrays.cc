#include "csrc/arrays.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "csrc/dlpack.h"

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
    case dlpack::kInt:
      return 'i';
    case dlpack::kUInt:
      return 'u';
    case dlpack::kFloat:
      return 'f';
    case dlpack::kComplex:
      return 'c';
    case dlpack::kBool:
      return 'b';
    default:
      return 'V';  // what NumPy calls a type that it does not know
  }
}

TensorView view_tensor(const dlpack::Tensor& tensor, bool writable) {
  TensorView view;
  const auto type = tensor.device.type;
  if (type == dlpack::kCuda || type == dlpack::kCudaManaged) {
    view.device = Device::kCuda;
  } else if (type != dlpack::kCpu && type != dlpack::kCudaHost) {
    throw py::type_error("is on a device of another kind, DLPack's number " + std::to_string(type));
  }
  if (view.device == Device::kCuda && tensor.device.id != 0) {
    throw py::type_error("is on GPU " + std::to_string(tensor.device.id) +
                         ", and only the first is used: set CUDA_VISIBLE_DEVICES");
  }
  view.pinned = type == dlpack::kCudaHost;
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
  py::dict how;
  if (device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged) {
    how["stream"] = stream == 0 ? 1 : stream;  // 1 is the default stream there
  }
  const py::object give = object.attr("__dlpack__");
  try {
    return give(**how, py::arg("max_version") = py::make_tuple(dlpack::kMajor, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return give(**how);  // of before its versions
}

// The capsule is not taken over: it is let go of with the view.
TensorView view_dlpack(const py::object& object, uintptr_t stream) {
  const py::object capsule = dlpack_capsule(object, stream);
  PyObject* const handle = capsule.ptr();
  TensorView view;
  if (PyCapsule_IsValid(handle, "dltensor_versioned")) {
    const auto* managed =
        static_cast<const dlpack::Versioned*>(PyCapsule_GetPointer(handle, "dltensor_versioned"));
    if (managed->major != dlpack::kMajor) {
      throw py::type_error("speaks version " + std::to_string(managed->major) + " of DLPack");
    }
    view = view_tensor(managed->tensor, (managed->flags & dlpack::kReadOnly) == 0);
  } else if (PyCapsule_IsValid(handle, "dltensor")) {
    const auto* managed =
        static_cast<const dlpack::Managed*>(PyCapsule_GetPointer(handle, "dltensor"));
    view = view_tensor(managed->tensor, true);
  } else {
    throw py::type_error("gives no DLPack capsule");
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
  const std::string called = "[" + std::string(op) + "] " + name;
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    try {
      return view_dlpack(object, stream);
    } catch (const py::type_error& error) {
      throw py::type_error(called + " " + error.what());
    }
  }
  throw py::type_error("[" + std::string(op) + "] expected " + name +
                       " to be a NumPy array, or to have __cuda_array_interface__ or __dlpack__, "
                       "got " +
                       type_name(object));
}

std::optional<TensorView> optional_view_of(const char* op, const char* name,
                                           const py::object& object, uintptr_t stream) {
  if (object.is_none()) return std::nullopt;
  return view_of(op, name, object, stream);
}

}  // namespace edgeclip
