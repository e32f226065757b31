"""Image encoders that read and write memory of the GPU: nothing goes through the host."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.base import EMBEDDING, PIXELS
from edgeclip.backends.cuda_array import DeviceArray, copy, cuda_errors
from edgeclip.backends.tensorrt_builder import import_tensorrt, trt_logger
from edgeclip.errors import BundleError, DeviceError


class TensorRTEncoder:
    """A TensorRT engine of an image encoder, pixels (N, 3, H, W) -> embedding (N, D).

    name: of the engine, for messages. Raises DeviceError where TensorRT does not take the engine,
    BundleError where it is not made for such pixels.
    """

    def __init__(self, engine: bytes, name: str) -> None:
        self._name = name
        self._trt = trt = import_tensorrt()
        self._log = trt_logger(trt)
        self._log.last_error = ""
        try:
            runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as err:  # its constructor gave nothing
            raise DeviceError(self._said("does not work here for")) from err
        self._engine = runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise DeviceError(self._said("does not take", "build it again with edgeclip build"))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        if sorted(names) != [EMBEDDING, PIXELS]:
            raise BundleError(
                f"{name} has the inputs and outputs {', '.join(names)}: build it again"
            )
        most = tuple(self._engine.get_tensor_profile_shape(PIXELS, 0)[2])
        dim = tuple(self._engine.get_tensor_shape(EMBEDDING))[-1]
        self.pixels = DeviceArray(most)
        self.embedding = DeviceArray((most[0], dim))
        self.lock = threading.Lock()
        # One context for each count, since what a graph captured of one must not change again; they
        # take turns in the memory that their layers work in.
        self._contexts: dict[int, Any] = {}
        self._work = DeviceArray((self._engine.device_memory_size_v2,), np.uint8)
        with cuda_errors():
            self.stream = _core.CudaStream()  # last, as attributes are let go of in this order

    def check_shapes(self, inputs: tuple[int, ...], embed_dim: int) -> None:
        """Raises BundleError where the engine is not made for inputs (N, *inputs) or embed_dim."""
        if (self.pixels.shape[1:], self.embedding.shape[1]) != (inputs, embed_dim):
            raise BundleError(
                f"{self._name} takes {self.pixels.shape[1:]} and gives {self.embedding.shape[1:]}, "
                "which is not what the manifest says"
            )

    def enqueue(self, count: int) -> None:
        if count not in self._contexts:
            self._contexts[count] = self._context(count)
        if not self._contexts[count].execute_async_v3(self.stream.handle):
            raise DeviceError(self._said("failed to run"))

    def is_capturable(self, count: int) -> bool:
        context = self._contexts[count]
        if not hasattr(context, "is_stream_capturable"):
            return True
        return bool(context.is_stream_capturable(self.stream.handle))  # TensorRT-RTX

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        most, dim = self.embedding.shape
        found = np.empty((len(inputs), dim), np.float32)
        with self.lock, cuda_errors():
            for start in range(0, len(inputs), most):
                part = np.ascontiguousarray(inputs[start : start + most], np.float32)
                rows = found[start : start + most]
                copy(self.pixels, part, self.stream.handle)
                self.enqueue(len(part))
                _core.cuda_copy(
                    rows.ctypes.data,
                    self.embedding.pointer,
                    rows.nbytes,
                    stream=self.stream.handle,
                )
                _core.cuda_synchronize(self.stream.handle)
        return found

    def _context(self, count: int) -> Any:
        context = self._new_context()
        if context is None:
            raise DeviceError(self._said("has no memory for"))
        good = context.set_optimization_profile_async(0, self.stream.handle)
        good = good and context.set_input_shape(PIXELS, (count, *self.pixels.shape[1:]))
        for name, array in ((PIXELS, self.pixels), (EMBEDDING, self.embedding)):
            good = good and context.set_tensor_address(name, array.pointer)
        if not good:
            raise DeviceError(self._said(f"does not take {count} images in"))
        context.set_device_memory(self._work.pointer, self._work.nbytes)
        return context

    def _new_context(self) -> Any:
        """That works in memory which it is given."""
        trt, managed = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return self._engine.create_execution_context(managed)
        # TensorRT-RTX would compile kernels for a shape in the background; a graph that was captured
        # before would keep the others.
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        return self._engine.create_execution_context(config)

    def _said(self, what: str, advice: str = "see edgeclip doctor") -> str:
        trt = self._trt
        reason = f" ({self._log.last_error})" if self._log.last_error else ""
        return f"{trt.__name__} {trt.__version__} {what} {self._name}{reason}: {advice}"
