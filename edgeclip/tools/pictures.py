"""Pictures that are the same on every machine: for golden values and for measuring speed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def golden_picture(height: int, width: int) -> NDArray[np.uint8]:
    """Draw a picture, uint8 (height, width, 3), with smooth areas, edges, fine lines and some noise.

    Every error in resizing, cropping or the order of colours changes its embedding.
    """
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    rgb = np.stack([0.2 + 0.6 * x, 0.3 + 0.5 * y, 0.7 - 0.4 * x * y], axis=2)
    rgb[np.hypot(x - 0.35, y - 0.4) < 0.22] = (0.85, 0.2, 0.15)
    rgb[(abs(x - 0.7) < 0.15) & (abs(y - 0.65) < 0.2)] = (0.1, 0.35, 0.8)
    rgb += 0.1 * np.sin(60 * np.pi * (x + 0.5 * y))[:, :, np.newaxis] * (y[:, :, np.newaxis] > 0.8)
    rgb += np.random.default_rng(0).normal(0, 0.02, rgb.shape)
    return np.round(255 * rgb.clip(0, 1)).astype(np.uint8)


def picture(width: int, height: int) -> Image.Image:
    """Draw a picture with the detail of a photograph, so that decoding it takes as long."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-8, 9, smooth.shape, np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
