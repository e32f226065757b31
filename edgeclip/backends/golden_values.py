"""Golden values of a bundle: an input, PyTorch's outputs, and the error limits of a device."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.bundle import GOLDEN, Bundle
from edgeclip.errors import BundleError
from edgeclip.manifest import Manifest
from edgeclip.precisions import PRECISIONS, REFERENCE

# Error of a device, relative to the exporter's: other kernels round differently.
DEVICE_FACTOR, DEVICE_OFFSET = 2.0, 0.01


class GoldenValues:
    """Arrays of golden.npz, which PyTorch computed at export.

    image: uint8 (H, W, 3). pixels: float32 (3, h, w). embedding: unit, (D,).
    prompts: (P,). ids: int64 (P, L). text_embeddings: unit, (P, D).
    prior_gradient: (D,), with a prior only: the gradient of its loss at `embedding`, at the middle
    timestep, with the first noise of DiffPurifier.
    Each attribute raises BundleError if its array is missing or has another shape.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._arrays = bundle.golden()
        self._path = bundle.path / GOLDEN
        self._manifest = bundle.manifest

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        return self._array("image", 3)

    @cached_property
    def pixels(self) -> NDArray[np.float32]:
        return self._array("pixels", 3, self._manifest.image.size)

    @cached_property
    def embedding(self) -> NDArray[np.float32]:
        return self._array("embedding", 1, (self._manifest.embed_dim,))

    @cached_property
    def prompts(self) -> list[str]:
        return [str(text) for text in self._array("prompts", 1)]

    @cached_property
    def ids(self) -> NDArray[np.int64]:
        return self._array("ids", 2)

    @cached_property
    def text_embeddings(self) -> NDArray[np.float32]:
        shape = len(self.prompts), self._manifest.embed_dim
        return self._array("text_embeddings", 2, shape)

    @cached_property
    def prior_gradient(self) -> NDArray[np.float32]:
        return self._array("prior_gradient", 1, (self._manifest.embed_dim,))

    def encoder(self, kind: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Return the inputs (N, ...) and unit embeddings (N, D) of the image or text encoder."""
        if kind == "image":
            return self.pixels[None], self.embedding[None]
        return self.ids, self.text_embeddings

    def _array(self, name: str, ndim: int, ending: tuple[int, ...] = ()) -> NDArray[Any]:
        """Return an array whose last dimensions are `ending`."""
        array = self._arrays.get(name)
        if array is None or array.ndim != ndim or array.shape[ndim - len(ending) :] != ending:
            raise BundleError(f"{self._path} has no array {name!r} of the right shape")
        return array


def embedding_limit(manifest: Manifest, precision: str, kind: str) -> float:
    """Return the largest distance allowed between a unit embedding and its golden value.

    kind: image or text. The limit follows the distance measured at export, if there is one; it never
    exceeds the precision's tolerance.
    """
    parity = manifest.precisions[precision].parity
    # Older bundles record one minimum for both kinds.
    cosine = parity.get(f"golden_{kind}_min_cosine", parity.get("golden_min_cosine"))
    tolerance = PRECISIONS[precision].tolerance
    if precision == REFERENCE or cosine is None:
        return tolerance
    exported = math.sqrt(max(2 - 2 * cosine, 0))
    return min(tolerance, DEVICE_FACTOR * exported + DEVICE_OFFSET)


def largest_distance(rows: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest distance between corresponding rows (N, D), or two vectors (D,)."""
    return float(np.linalg.norm(rows - expected, axis=-1).max())
