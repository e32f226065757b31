"""Augmentations of a training image, whose random numbers come from the image's own generator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Window = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image.

    pixels: changes of the preprocessed image, float32 (3, H, W) in [0, 1]. window: draws the part of
    the decoded image, of a height and width, that is resized to the input size; None for all of it.
    """

    pixels: Callable[[torch.Tensor, torch.Generator], torch.Tensor]
    window: Callable[[int, int, torch.Generator], Window] | None = None


def flip(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirror the image with probability 1/2."""
    return image.flip(-1) if torch.rand((), generator=rng) < 0.5 else image


def crop(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Crop 60 to 100 % of each side at random, enlarge the crop to full size, and flip it."""
    height, width = image.shape[1:]
    share = 0.6 + 0.4 * torch.rand(2, generator=rng)
    rows, columns = max(1, int(share[0] * height)), max(1, int(share[1] * width))
    top = int(torch.randint(height - rows + 1, (), generator=rng))
    left = int(torch.randint(width - columns + 1, (), generator=rng))
    cropped = image[:, top : top + rows, left : left + columns]
    return flip(_resize(cropped, (height, width)), rng)


def draw_window(height: int, width: int, rng: torch.Generator) -> Window:
    """Draw a part of 35 to 100 % of the area and of aspect 3/4 to 4/3, cut to the image's sides.

    After Szegedy et al., CVPR 2015, arXiv 1409.4842, section 6.
    """
    area = height * width * _uniform((), 0.35, 1.0, rng).item()
    aspect = math.exp(_uniform((), -math.log(4 / 3), math.log(4 / 3), rng).item())
    rows = min(height, max(1, round(math.sqrt(area / aspect))))
    columns = min(width, max(1, round(math.sqrt(area * aspect))))
    top = int(torch.randint(height - rows + 1, (), generator=rng))
    left = int(torch.randint(width - columns + 1, (), generator=rng))
    return slice(top, top + rows), slice(left, left + columns)


def photographs(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirror one image in two; shrink one in four to 32 to 96 pixels, and enlarge it again.

    Enlarged images are like those of data sets of small pictures. An image that is smaller is left.
    """
    coarse = torch.rand((), generator=rng) < 0.25
    side = int(torch.randint(32, 97, (), generator=rng))
    height, width = image.shape[1:]
    scale = side / max(height, width)
    if coarse and scale < 1:
        small = max(1, round(scale * height)), max(1, round(scale * width))
        image = _resize(_resize(image, small), (height, width))
    return flip(image, rng)


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize an image (3, H, W) by a bicubic filter with antialiasing."""
    resized = F.interpolate(image[None], size=size, mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1)


def garments(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Turn a grey garment on black, as in Fashion-MNIST, into a coloured photograph by `augment`."""
    grey = (image[:1] * 255).round().to(torch.uint8)
    return augment(grey, rng)[0]


def to_rgb(grey: torch.Tensor) -> torch.Tensor:
    """Convert grey uint8 (N, H, W) to float32 (N, 3, H, W) in [0, 1]."""
    return (grey.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1)


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> torch.Tensor:
    """Draw from the uniform distribution between low and high."""
    return torch.rand(shape, generator=rng) * (high - low) + low


def recolour(
    grey: torch.Tensor,
    rng: torch.Generator,
    *,
    background: tuple[float, float] = (0.75, 1.0),
    tint: tuple[float, float] = (0.1, 0.9),
) -> torch.Tensor:
    """Paint garments in a random colour on a random plain background.

    grey: uint8 (N, H, W), garments on black, as in Fashion-MNIST. background, tint: ranges from which
    each channel of the background and of the garment's colour is drawn. The defaults are the "light
    backgrounds" test of the embedded bundle. Returns float32 (N, 3, H, W) in [0, 1].
    """
    shade = grey.float().unsqueeze(1) / 255
    garment = (grey > 8).float().unsqueeze(1)  # pixels outside the garment are at most 8
    n = len(grey)
    colour = _uniform((n, 3, 1, 1), *tint, rng)
    backdrop = _uniform((n, 3, 1, 1), *background, rng)
    return garment * colour * (0.15 + 0.85 * shade) + (1 - garment) * backdrop


def augment(grey: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Draw random pictures of garments: colour, inversion, geometry, blur and noise.

    grey: uint8 (N, H, W). About a third of the pictures stay grey on black. Returns float32
    (N, 3, H, W) in [0, 1].
    """
    n = len(grey)
    plain = to_rgb(grey)
    light = recolour(grey, rng, background=(0.55, 1.0), tint=(0.0, 1.0))
    any_background = recolour(grey, rng, background=(0.0, 1.0), tint=(0.0, 1.0))
    look = torch.rand((n, 1, 1, 1), generator=rng)
    images = torch.where(look < 0.35, plain, torch.where(look < 0.75, light, any_background))
    inverted = torch.rand((n, 1, 1, 1), generator=rng) < 0.1
    images = torch.where(inverted, 1 - images, images)
    return _photograph(_move(images, rng), rng)


def _move(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirror, scale, stretch, rotate and shift at random; pixels from outside repeat the border."""
    n = len(images)
    scale = torch.exp(_uniform((n,), -0.1, 0.35, rng))  # above 1 the garment becomes smaller
    aspect = torch.exp(_uniform((n,), -0.2, 0.2, rng))
    angle = _uniform((n,), -0.15, 0.15, rng)  # radians
    mirror = torch.where(torch.rand((n,), generator=rng) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = _uniform((2, n), -0.2, 0.2, rng)
    theta = torch.stack(
        [
            torch.stack([mirror * cos * aspect, -sin, shift[0]], 1),
            torch.stack([mirror * sin * aspect, cos, shift[1]], 1),
        ],
        1,
    )
    # Half of the images keep the framing of the data set, the most common one.
    still = torch.rand((n, 1, 1), generator=rng) < 0.5
    identity = torch.eye(2, 3).expand(n, 2, 3) * torch.stack([mirror, torch.ones(n)], 1).unsqueeze(
        2
    )
    grid = F.affine_grid(
        torch.where(still, identity, theta), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _photograph(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Add blur, uneven light and sensor noise, each to 30 % of the images."""
    n, _, height, width = images.shape
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = _uniform((n, 1, 1, 1), 0, 1, rng) * (torch.rand((n, 1, 1, 1), generator=rng) < 0.3)
    images = torch.lerp(images, blurred, amount)
    slope = _uniform((n, 1, 2, 1, 1), -0.15, 0.15, rng)
    slope = slope * (torch.rand((n, 1, 1, 1, 1), generator=rng) < 0.3)
    down = torch.linspace(-1, 1, height).view(1, 1, height, 1)
    across = torch.linspace(-1, 1, width).view(1, 1, 1, width)
    images = images + slope[:, :, 0] * down + slope[:, :, 1] * across
    sigma = _uniform((n, 1, 1, 1), 0, 0.06, rng) * (torch.rand((n, 1, 1, 1), generator=rng) < 0.3)
    return (images + sigma * torch.randn(images.shape, generator=rng)).clamp(0, 1)


AUGMENTATIONS: dict[str, Augmentation | None] = {
    "none": None,
    "flip": Augmentation(flip),
    "crop": Augmentation(crop),
    "photographs": Augmentation(photographs, draw_window),
    "garments": Augmentation(garments),
}
