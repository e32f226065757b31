#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <string>

#include "csrc/arrays.h"
#include "csrc/device.h"

namespace py = pybind11;

namespace edgeclip {
namespace {

// What is let go of here waits for the GPU, which the other threads of Python need not do.
struct WithoutGil {
  template <typename T>
  void operator()(T* object) const {
    const py::gil_scoped_release release;
    delete object;
  }
};

template <typename T>
using Holder = std::unique_ptr<T, WithoutGil>;

py::dict device_py() {
  const cuda::DeviceInfo info = cuda::device_info();
  py::dict found;
  found["name"] = info.name;
  found["index"] = info.index;
  found["capability"] = py::make_tuple(info.major, info.minor);
  found["memory"] = info.memory;
  found["free_memory"] = info.free_memory;
  found["driver"] = info.driver;
  return found;
}

void copy_py(uintptr_t to, uintptr_t from, int64_t bytes, uintptr_t stream) {
  py::gil_scoped_release release;
  cuda::copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, stream);
}

// A collection of garbage would free memory of the GPU, which must not be while it is captured.
class NoCollection {
 public:
  NoCollection() : was_enabled_(PyGC_Disable() != 0) {}
  NoCollection(const NoCollection&) = delete;
  NoCollection& operator=(const NoCollection&) = delete;
  ~NoCollection() {
    if (was_enabled_) PyGC_Enable();
  }

 private:
  bool was_enabled_;
};

Holder<cuda::Graph> capture_py(const cuda::Stream& stream, const py::function& queue) {
  const NoCollection guard;
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
    R"(Memory of the GPU, all zero; or with pinned=True of the host, which the GPU uses in place.

pointer: its address, the same for CPU and GPU where it is pinned. It is freed with the object, for
which all work that uses it has to be done. Raises RuntimeError with CUDA's error.)";

constexpr const char* kStreamDoc =
    R"(A CUDA stream of its own, which does not wait for the default stream.

handle: the cudaStream_t as an integer, as operations take it.)";

constexpr const char* kCaptureDoc =
    R"(What `queue()` queues on this stream, as a graph, without running it.

All of it must have run once before, so that kernels are loaded; `queue` may neither wait for the GPU
nor allocate. The arrays that it used must stay where they are for as long as the graph is used.)";

}  // namespace

void bind_device(py::module_& m) {
  py::class_<cuda::Memory, Holder<cuda::Memory>>(m, "CudaMemory", kMemoryDoc)
      .def(py::init<int64_t, bool>(), py::arg("nbytes"), py::kw_only(), py::arg("pinned") = false,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly(
          "pointer",
          [](const cuda::Memory& memory) { return reinterpret_cast<uintptr_t>(memory.data()); })
      .def_property_readonly("nbytes", &cuda::Memory::bytes)
      .def_property_readonly("pinned", &cuda::Memory::pinned);
  py::class_<cuda::Graph, Holder<cuda::Graph>>(m, "CudaGraph", "What a stream's capture returns.")
      .def("launch", &cuda::Graph::launch, py::arg("stream"),
           "Queues all of it, without waiting for it.");
  py::class_<cuda::Stream, Holder<cuda::Stream>>(m, "CudaStream", kStreamDoc)
      .def(py::init<>())
      .def_property_readonly("handle", &cuda::Stream::handle)
      .def("capture", &capture_py, py::arg("queue"), kCaptureDoc);
  py::class_<cuda::Event>(m, "CudaEvent", "A point in a stream's work, for timing.")
      .def(py::init<>())
      .def("record", &cuda::Event::record, py::arg("stream"))
      .def("milliseconds_since", &cuda::Event::milliseconds_since, py::arg("earlier"),
           py::call_guard<py::gil_scoped_release>(), "Waits for this one.");
  m.def("cuda_copy", &copy_py, py::arg("to"), py::arg("from_"), py::arg("nbytes"), py::kw_only(),
        py::arg("stream"),
        "Queues a copy between two addresses, of the GPU's memory or the host's.");
  m.def(
      "cuda_synchronize", &cuda::synchronize, py::arg("stream"),
      py::call_guard<py::gil_scoped_release>(),
      "Waits for all that was queued on a stream. Raises RuntimeError with an error of that work.");
  m.def("cuda_device", &device_py,
        "The current GPU: name, index, capability (major, minor), memory and free_memory in bytes, "
        "and the driver's CUDA version as 13000. Raises RuntimeError where there is "
        "none.");
}

}  // namespace edgeclip
