"""Image encoder on the GPU by a TensorRT engine."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.base import EMBEDDING, PIXELS
from edgeclip.backends.cuda_array import DeviceArray, copy, cuda_errors
from edgeclip.backends.tensorrt_module import import_tensorrt, trt_logger
from edgeclip.errors import BundleError, DeviceError


class TensorRTEncoder:
    """A GpuEncoder by a TensorRT engine, pixels (N, 3, H, W) -> embedding (N, D).

    name: the engine's, for messages. Raises DeviceError if TensorRT rejects the engine, BundleError
    if its inputs and outputs are others.
    """

    def __init__(self, engine: bytes, name: str) -> None:
        self._name = name
        self._trt = trt = import_tensorrt()
        self._log = trt_logger(trt)
        self._log.last_error = ""
        try:
            runtime = trt.Runtime(self._log)
        except (TypeError, RuntimeError) as err:  # the constructor returned nullptr
            raise DeviceError(self._message("does not work here for")) from err
        self._engine = runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise DeviceError(self._message("cannot load", "build it again with edgeclip build"))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        if sorted(names) != [EMBEDDING, PIXELS]:
            raise BundleError(
                f"{name} has the inputs and outputs {', '.join(names)}: build it again with "
                "edgeclip build"
            )
        largest = tuple(self._engine.get_tensor_profile_shape(PIXELS, 0)[2])
        dim = tuple(self._engine.get_tensor_shape(EMBEDDING))[-1]
        self.pixels = DeviceArray(largest)
        self.embedding = DeviceArray((largest[0], dim))
        self.lock = threading.Lock()
        # One context for each batch size, since a context must not change once a graph captured it.
        # All contexts share the workspace, because only one runs at a time.
        self._contexts: dict[int, Any] = {}
        self._workspace = DeviceArray((self._engine.device_memory_size_v2,), np.uint8)
        with cuda_errors():
            self.stream = _core.CudaStream()  # last: attributes are released in this order

    def check_shapes(self, inputs: tuple[int, ...], embed_dim: int) -> None:
        """Raise BundleError unless the engine maps (N, *inputs) to (N, embed_dim)."""
        if (self.pixels.shape[1:], self.embedding.shape[1]) != (inputs, embed_dim):
            raise BundleError(
                f"{self._name} maps {self.pixels.shape[1:]} to {self.embedding.shape[1:]}, which "
                "contradicts the manifest: build it again with edgeclip build"
            )

    def enqueue(self, count: int) -> None:
        if count not in self._contexts:
            self._contexts[count] = self._context(count)
        if not self._contexts[count].execute_async_v3(self.stream.handle):
            raise DeviceError(self._message("failed to run"))

    def is_capturable(self, count: int) -> bool:
        context = self._contexts[count]
        if not hasattr(context, "is_stream_capturable"):
            return True
        return bool(context.is_stream_capturable(self.stream.handle))  # TensorRT-RTX

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        max_batch, dim = self.embedding.shape
        embeddings = np.empty((len(inputs), dim), np.float32)
        with self.lock, cuda_errors():
            for start in range(0, len(inputs), max_batch):
                batch = np.ascontiguousarray(inputs[start : start + max_batch], np.float32)
                rows = embeddings[start : start + max_batch]
                copy(self.pixels, batch, self.stream.handle)
                self.enqueue(len(batch))
                _core.cuda_copy(
                    rows.ctypes.data,
                    self.embedding.pointer,
                    rows.nbytes,
                    stream=self.stream.handle,
                )
                _core.cuda_synchronize(self.stream.handle)
        return embeddings

    def _context(self, count: int) -> Any:
        context = self._new_context()
        if context is None:
            raise DeviceError(self._message("has no memory for"))
        accepted = context.set_optimization_profile_async(0, self.stream.handle)
        accepted = accepted and context.set_input_shape(PIXELS, (count, *self.pixels.shape[1:]))
        for name, array in ((PIXELS, self.pixels), (EMBEDDING, self.embedding)):
            accepted = accepted and context.set_tensor_address(name, array.pointer)
        if not accepted:
            raise DeviceError(self._message(f"rejects a batch of {count} images for"))
        context.set_device_memory(self._workspace.pointer, self._workspace.nbytes)
        return context

    def _new_context(self) -> Any:
        """Create a context whose memory the caller provides."""
        trt, managed = self._trt, self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return self._engine.create_execution_context(managed)
        # By default TensorRT-RTX compiles kernels for a shape in the background, and a graph captured
        # before would keep the slower ones.
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(managed)
        strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        return self._engine.create_execution_context(config)

    def _message(self, problem: str, advice: str = "see edgeclip doctor") -> str:
        trt = self._trt
        reason = f" ({self._log.last_error})" if self._log.last_error else ""
        return f"{trt.__name__} {trt.__version__} {problem} {self._name}{reason}: {advice}"
