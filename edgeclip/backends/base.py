"""Interfaces of encoders, on the host and on the GPU."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.backends.cuda_array import DeviceArray

PIXELS, EMBEDDING, TOKENS = "pixels", "embedding", "tokens"


class Encoder(Protocol):
    """An image or text encoder of a bundle on one device."""

    def check_shapes(self, inputs: tuple[int, ...], embed_dim: int) -> None:
        """Raises BundleError where the encoder is not made for inputs (N, *inputs) or embed_dim."""

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Embeddings (N, D), not normalised."""


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their norms; a row of an encoder is never zero unless its weights are."""
    divided: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return divided


class GpuEncoder(Protocol):
    """An image encoder whose input and output stay on the GPU. Its user holds `lock`."""

    stream: _core.CudaStream
    pixels: DeviceArray  # float32 (B, 3, H, W)
    embedding: DeviceArray  # float32 (B, D)
    lock: threading.Lock

    def is_capturable(self, count: int) -> bool:
        """Whether `enqueue` of `count`, which ran before, may be part of a CUDA graph."""

    def enqueue(self, count: int) -> None:
        """Queue on `stream`: embeddings of the first `count` of `pixels`, not normalised."""
