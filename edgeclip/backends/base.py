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
        """Raise BundleError unless the encoder maps (N, *inputs) to (N, embed_dim)."""

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return embeddings (N, D), not normalised."""


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide rows by their norms, which are above 0 unless the encoder's weights are all 0."""
    divided: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return divided


class GpuEncoder(Protocol):
    """An image encoder whose input and output stay on the GPU. Callers hold `lock`."""

    stream: _core.CudaStream
    pixels: DeviceArray  # float32 (B, 3, H, W)
    embedding: DeviceArray  # float32 (B, D)
    lock: threading.Lock

    def is_capturable(self, count: int) -> bool:
        """Return whether a CUDA graph may capture `enqueue(count)`, which has run before."""

    def enqueue(self, count: int) -> None:
        """Encode the first `count` of `pixels` on `stream`, without normalisation."""
