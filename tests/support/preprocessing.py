"""Reference for _core.preprocess: open_clip's sizes, Pillow's resizing, crop and padding.

Pillow 13 and later resize vertically first if the height shrinks much more than the width, which
changes some pixels by a few levels. edgeclip does the same. The reference runs the two passes in that
order itself, so that its pixels do not depend on the version of Pillow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from edgeclip import _core

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES = ("shortest", "longest", "squash")
pillow_resize = Image.Image.resize


def two_passes(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """Resize as Pillow 13 does, with any version of Pillow."""
    width, height = size
    vertical = max(0, 2 * (image.width - width)) < image.height - height
    between = (image.width, height) if vertical else (width, image.height)
    return pillow_resize(pillow_resize(image, between, resample), size, resample)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(image: np.ndarray, target: tuple[int, int], **options: Any) -> np.ndarray:
    """Return edgeclip's pixels before normalisation, uint8 (h, w, 3)."""
    out = np.full((3, *target), np.nan, np.float32)
    _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1), **options)
    values = out * np.float32(255)
    assert np.abs(values - np.rint(values)).max() < 1e-3
    return np.rint(values).astype(np.uint8).transpose(1, 2, 0)


def resized_size(height: int, width: int, target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Return open_clip's height and width between resizing and crop or padding."""
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        size, short, long = target[0], min(height, width), max(height, width)
        other = int(size * long / short)
        return (other, size) if width <= height else (size, other)
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if mode == "longest" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def crop_or_pad(length: int, target: int) -> tuple[slice, slice]:
    """Return the part of a resized side that remains, and its place in the output."""
    if length < target:
        first = (target - length) // 2
        return slice(0, length), slice(first, first + length)
    first = round((length - target) / 2)
    return slice(first, first + target), slice(0, target)


def pillow_pixels(
    image: np.ndarray, target: tuple[int, int], resize: str, interpolation: str, fill: int = 0
) -> np.ndarray:
    """Return the reference's pixels before normalisation, uint8 (h, w, 3)."""
    height, width = resized_size(*image.shape[:2], target, resize)
    picture = Image.fromarray(np.ascontiguousarray(image))
    resized = np.asarray(two_passes(picture, (width, height), FILTERS[interpolation]))
    rows, out_rows = crop_or_pad(height, target[0])
    columns, out_columns = crop_or_pad(width, target[1])
    out = np.full((*target, 3), fill, np.uint8)
    out[out_rows, out_columns] = resized[rows, columns]
    return out
