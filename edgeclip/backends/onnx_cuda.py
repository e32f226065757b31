"""Image encoder on the GPU by ONNX Runtime's CUDA provider."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.base import EMBEDDING
from edgeclip.backends.cuda_array import DeviceArray, cuda_errors
from edgeclip.backends.onnx_runtime import OnnxEncoder, first_line, import_onnxruntime
from edgeclip.errors import DeviceError


class OnnxGpuEncoder(OnnxEncoder):
    """A GpuEncoder by ONNX Runtime, which is an OnnxEncoder too.

    shape: one input, (3, H, W). Raises DeviceError and BundleError, see OnnxEncoder.
    """

    memory = "cuda"  # ONNX Runtime's device name of the bound arrays

    def __init__(
        self,
        path: Path,
        *,
        shape: tuple[int, ...],
        embed_dim: int,
        max_batch: int,
        threads: int | None = None,
    ) -> None:
        with cuda_errors():
            stream = _core.CudaStream()
        super().__init__(path, device="cuda", threads=threads, stream=stream.handle)
        self.check_shapes(shape, embed_dim)
        batch = self._batch or max_batch
        self.pixels = DeviceArray((batch, *shape))
        self.embedding = DeviceArray((batch, embed_dim))
        self.lock = threading.Lock()
        self._bindings: dict[int, Any] = {}
        self._options = import_onnxruntime().RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.stream = stream  # last: attributes are released in this order

    def is_capturable(self, count: int) -> bool:
        return False  # ONNX Runtime allocates while it runs

    def enqueue(self, count: int) -> None:
        try:
            if count not in self._bindings:
                self._bindings[count] = self._bind(count)
            self._session.run_with_iobinding(self._bindings[count], self._options)
        except Exception as err:  # the library has no public base class for its errors
            raise DeviceError(f"{self._path.name} failed on cuda: {first_line(err)}") from err

    def _bind(self, count: int) -> Any:
        binding = self._session.io_binding()
        for bind, name, array in (
            (binding.bind_input, self._input, self.pixels),
            (binding.bind_output, EMBEDDING, self.embedding),
        ):
            batch = array.head((count, *array.shape[1:]))
            bind(name, self.memory, 0, np.float32, batch.shape, batch.pointer)
        return binding

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        with self.lock:  # all threads share the stream
            return super().embed(inputs)
