"""Golden values of a bundle: one input and its outputs in PyTorch, and how far off a device may be."""

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

# A device may be this much further off than the exporter was: other kernels round other values.
DEVICE_FACTOR, DEVICE_OFFSET = 2.0, 0.01


class GoldenValues:
    """The arrays of golden.npz, which PyTorch computed at export, with their shapes checked.

    image uint8 (H, W, 3); its pixels float32 (3, h, w) and unit embedding (D,); prompts (P,), their ids
    int64 (P, L) and unit text_embeddings (P, D); with a prior, prior_gradient (D,): the gradient of its
    loss there, halfway of its timesteps, with the first noise of DiffPurifier.
    Every attribute raises BundleError where its array is missing or has another shape.
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
        """Return inputs of the image or text encoder (N, ...), and their embeddings (N, D)."""
        if kind == "image":
            return self.pixels[None], self.embedding[None]
        return self.ids, self.text_embeddings

    def _array(self, name: str, ndim: int, ending: tuple[int, ...] = ()) -> NDArray[Any]:
        """Return an array whose last sizes are `ending`."""
        array = self._arrays.get(name)
        if array is None or array.ndim != ndim or array.shape[ndim - len(ending) :] != ending:
            raise BundleError(f"{self._path} has no array {name!r} of the right shape")
        return array


def embedding_limit(manifest: Manifest, precision: str, kind: str) -> float:
    """Return the largest distance of a unit embedding, image or text, from its golden one.

    Where export measured the distance, a device may be somewhat further off, within the
    precision's tolerance.
    """
    parity = manifest.precisions[precision].parity
    # Older bundles have the worst of both kinds only.
    cosine = parity.get(f"golden_{kind}_min_cosine", parity.get("golden_min_cosine"))
    tolerance = PRECISIONS[precision].tolerance
    if precision == REFERENCE or cosine is None:
        return tolerance
    exported = math.sqrt(max(2 - 2 * cosine, 0))
    return min(tolerance, DEVICE_FACTOR * exported + DEVICE_OFFSET)


def largest_distance(rows: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the largest distance between rows (N, D), or between two vectors (D,)."""
    return float(np.linalg.norm(rows - expected, axis=-1).max())
