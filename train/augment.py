"""Random changes of one training image, float32 (3, H, W) in [0, 1], by a generator of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from train import fashion

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def flip(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirrored, every second time."""
    return image.flip(-1) if torch.rand((), generator=rng) < 0.5 else image


def crop(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A random part of 60 to 100 % of each side, enlarged to the whole, and a flip."""
    height, width = image.shape[1:]
    share = 0.6 + 0.4 * torch.rand(2, generator=rng)
    rows, columns = max(1, int(share[0] * height)), max(1, int(share[1] * width))
    top = int(torch.randint(height - rows + 1, (), generator=rng))
    left = int(torch.randint(width - columns + 1, (), generator=rng))
    part = image[None, :, top : top + rows, left : left + columns]
    part = F.interpolate(part, size=(height, width), mode="bicubic", antialias=True)
    return flip(part[0].clamp(0, 1), rng)


def garments(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Fashion-MNIST's grey garments on black as coloured photographs: see `fashion.augment`."""
    grey = (image[:1] * 255).round().to(torch.uint8)
    return fashion.augment(grey, rng)[0]


AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "flip": flip,
    "crop": crop,
    "garments": garments,
}
