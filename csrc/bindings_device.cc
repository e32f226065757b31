#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>

#include "csrc/arrays.h"
#include "csrc/cuda/error.h"
#include "csrc/device.h"

namespace py = pybind11;

namespace edgeclip {
namespace {

// Releases the GIL, since destroying a CUDA resource waits for the GPU.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* object) const {
    const py::gil_scoped_release release;
    delete object;
  }
};

template <typename T>
using Holder = std::unique_ptr<T, DeleteWithoutGil>;

py::dict device_py() {
  const cuda::DeviceInfo info = cuda::device_info();
  py::dict device;
  device["name"] = info.name;
  device["index"] = info.index;
  device["capability"] = py::make_tuple(info.major, info.minor);
  device["memory"] = info.memory;
  device["free_memory"] = info.free_memory;
  device["driver"] = info.driver;
  return device;
}

void copy_py(uintptr_t to, uintptr_t from, int64_t bytes, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, stream);
}

// Disables Python's garbage collector: it could free GPU memory, which CUDA forbids during a
// capture.
class GcGuard {
 public:
  GcGuard() : was_enabled_(PyGC_Disable() != 0) {}
  GcGuard(const GcGuard&) = delete;
  GcGuard& operator=(const GcGuard&) = delete;
  ~GcGuard() {
    if (was_enabled_) PyGC_Enable();
  }

 private:
  bool was_enabled_;
};

Holder<cuda::Graph> capture_py(const cuda::Stream& stream, const py::function& queue) {
  const GcGuard guard;
  stream.begin_capture();
  try {
    queue();
  } catch (...) {
    stream.abandon_capture();
    throw;
  }
  return Holder<cuda::Graph>(stream.end_capture().release());
}

constexpr const char* kMemoryDoc =
    R"(Zero-initialized GPU memory, or with pinned=True host memory that the GPU accesses in place.

pointer: address; for pinned memory the same on CPU and GPU. The memory is freed with the object:
all work that uses it must be done by then. Raises CudaError if the allocation fails.)";

constexpr const char* kStreamDoc =
    R"(A CUDA stream that does not synchronize with the default stream.

handle: cudaStream_t as an integer, for the `stream` of operations. Raises CudaError.)";

constexpr const char* kCaptureDoc =
    R"(Capture the work that `queue()` queues on this stream, without running it, as a CudaGraph.

The same work must have run once before, so that its kernels are loaded. `queue` may neither wait
for the GPU nor allocate. Arrays it uses must keep their addresses as long as the graph is used.
Raises CudaError if CUDA cannot capture the work.)";

constexpr const char* kErrorDoc =
    R"(A failed CUDA call, a missing GPU, or a CUDA operation of an edgeclip built without CUDA.)";

}  // namespace

void bind_device(py::module_& m) {
  py::register_local_exception<cuda::Error>(m, "CudaError", PyExc_RuntimeError).doc() = kErrorDoc;
  py::class_<cuda::Memory, Holder<cuda::Memory>>(m, "CudaMemory", kMemoryDoc)
      .def(py::init<int64_t, bool>(), py::arg("nbytes"), py::kw_only(), py::arg("pinned") = false,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "pointer",
          [](const cuda::Memory& memory) { return reinterpret_cast<uintptr_t>(memory.data()); })
      .def_property_readonly("nbytes", &cuda::Memory::bytes)
      .def_property_readonly("pinned", &cuda::Memory::pinned);
  py::class_<cuda::Graph, Holder<cuda::Graph>>(m, "CudaGraph",
                                               "A CUDA graph, captured from a CudaStream.")
      .def("launch", &cuda::Graph::launch, py::arg("stream"),
           "Queue the graph's work on a stream.");
  py::class_<cuda::Stream, Holder<cuda::Stream>>(m, "CudaStream", kStreamDoc)
      .def(py::init<>())
      .def_property_readonly("handle", &cuda::Stream::handle)
      .def("capture", &capture_py, py::arg("queue"), kCaptureDoc);
  py::class_<cuda::Event>(m, "CudaEvent", "A CUDA event, for timing.")
      .def(py::init<>())
      .def("record", &cuda::Event::record, py::arg("stream"),
           "Record the event after the work queued on a stream so far.")
      .def("milliseconds_since", &cuda::Event::milliseconds_since, py::arg("earlier"),
           py::call_guard<py::gil_scoped_release>(),
           "Wait for this event, and return the milliseconds since an earlier one.");
  m.def("cuda_copy", &copy_py, py::arg("to"), py::arg("from_"), py::arg("nbytes"), py::kw_only(),
        py::arg("stream"), "Queue a copy between two addresses in GPU or host memory.");
  m.def("cuda_synchronize", &cuda::synchronize, py::arg("stream"),
        py::call_guard<py::gil_scoped_release>(),
        "Wait for all work queued on a stream. Raises CudaError if that work failed.");
  m.def(
      "cuda_device", &device_py,
      "Describe the current GPU: name, index, capability (major, minor), memory and free_memory in "
      "bytes, and the newest CUDA version of its driver (13000 is 13.0). Raises CudaError if "
      "there is no GPU.");
}

}  // namespace edgeclip
