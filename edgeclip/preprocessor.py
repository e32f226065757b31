"""Preparation of images: pixels for an encoder on the host, decoded frames for a GPU pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core
from edgeclip.images.decoding import CudaFrame, ImageSource, decode, is_on_gpu
from edgeclip.manifest import ImageSpec
from edgeclip.prefetch import Batches, batches


class Preprocessor:
    """Decoding, resizing and normalisation of images for a bundle's encoder.

    exact: decode large JPEGs at full size; see `edgeclip.images.decoding.decode`.
    threads: for one image; None for as many of the usable cores as its size deserves.
    """

    def __init__(self, spec: ImageSpec, *, exact: bool, threads: int | None) -> None:
        self._spec, self._fast_for = spec, None if exact else spec
        self._threads = threads or 0

    def pixels(self, images: Sequence[ImageSource]) -> NDArray[np.float32]:
        """Return the encoder's input, float32 (N, 3, H, W)."""
        rows = np.empty((len(images), 3, *self._spec.size), np.float32)
        for row, image in zip(rows, images, strict=True):
            self._write_pixels(row, image)
        return rows

    def pixel_batches(
        self, images: Iterable[ImageSource], batch_size: int, workers: int
    ) -> Batches:
        """Yield the encoder's input in batches; see `edgeclip.prefetch.batches`."""
        shape = batch_size, 3, *self._spec.size
        return batches(images, self._write_pixels, shape, workers)

    def frames(self, images: Sequence[ImageSource]) -> NDArray[Any]:
        """Return decoded images, or arrays on the GPU as they are, as objects (N, 1)."""
        rows = np.empty((len(images), 1), object)
        for row, image in zip(rows, images, strict=True):
            row[0] = self._frame(image)
        return rows

    def frame_batches(
        self, images: Iterable[ImageSource], batch_size: int, workers: int
    ) -> Batches:
        """Yield frames in batches; see `edgeclip.prefetch.batches`."""
        return batches(images, self._write_frame, (batch_size, 1), workers, object)

    def _write_pixels(self, row: NDArray[np.float32], image: ImageSource) -> None:
        spec = self._spec
        _core.preprocess(
            decode(image, fast_for=self._fast_for),
            row,
            mean=spec.mean,
            std=spec.std,
            resize=spec.resize,
            interpolation=spec.interpolation,
            fill=spec.fill,
            threads=self._threads,
        )

    def _frame(self, image: ImageSource) -> NDArray[np.uint8] | CudaFrame:
        return image if is_on_gpu(image) else decode(image, fast_for=self._fast_for)

    def _write_frame(self, row: NDArray[Any], image: ImageSource) -> None:
        frame = self._frame(image)
        # Copied, since the source may overwrite its array before the batch is classified.
        row[0] = np.array(frame) if frame is image and isinstance(image, np.ndarray) else frame
