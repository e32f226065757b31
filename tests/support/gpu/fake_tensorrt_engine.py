"""Classes of fake_tensorrt that run engines, in ONNX Runtime on the CPU.

`self._trt` is the module that a class belongs to.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        """Open the graph of an engine in ONNX Runtime on the CPU."""
        try:
            built = json.loads(serialized_engine)
            if built["version"] != self._trt.__version__:
                raise ValueError("The engine plan file is not compatible with this version")
        except ValueError as err:
            self._logger.log(self._trt.ILogger.Severity.ERROR, str(err))
            return None
        engine = self._trt.ICudaEngine()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        engine._session = ort.InferenceSession(built["graph"], options)
        engine._built = built
        return engine


class ICudaEngine:
    device_memory_size_v2 = 4096

    @property
    def num_io_tensors(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return [node.name for node in self._session.get_inputs()] + self._built["outputs"]

    def get_tensor_name(self, index: int) -> str:
        return self._names()[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        nodes = (*self._session.get_inputs(), *self._session.get_outputs())
        (shape,) = (node.shape for node in nodes if node.name == name)
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._built["profiles"][profile_index][name]]

    def create_execution_context(self, strategy: Any) -> Any:
        context = self._trt.IExecutionContext()
        context._engine, context._strategy = self, strategy
        context._shapes, context._addresses = {}, {}
        context._profile = context._memory = None
        return context


class IExecutionContext:
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine._names()

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory if size >= self._engine.device_memory_size_v2 else None

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the run on the stream, so that a CUDA graph can capture and repeat it."""
        managed = self._strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._profile is None or (managed and self._memory is None):
            return False
        self._trt._fake.queue(stream_handle, self._run)
        return True

    def _run(self) -> None:
        (node,) = self._engine._session.get_inputs()
        pixels = _floats(self._addresses[node.name], self._shapes[node.name])
        names = self._engine._built["outputs"]
        for name, value in zip(
            names, self._engine._session.run(names, {node.name: pixels}), strict=True
        ):
            _floats(self._addresses[name], value.shape)[...] = value


def _floats(address: int, shape: Sequence[int]) -> Any:
    kind = ctypes.c_float * math.prod(shape)
    return np.ctypeslib.as_array(kind.from_address(address)).reshape(shape)


CLASSES = (ICudaEngine, IExecutionContext, Runtime)
