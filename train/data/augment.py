"""Random changes of one training image, float32 (3, H, W) in [0, 1], by a generator of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

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
    """Fashion-MNIST's grey garments on black as coloured photographs: see `augment`."""
    grey = (image[:1] * 255).round().to(torch.uint8)
    return augment(grey, rng)[0]


def to_rgb(grey: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W) -> float32 (N, 3, H, W) in [0, 1]."""
    return (grey.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1)


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=rng) * (high - low) + low


def recolour(
    grey: torch.Tensor,
    rng: torch.Generator,
    *,
    background: tuple[float, float] = (0.75, 1.0),
    tint: tuple[float, float] = (0.1, 0.9),
) -> torch.Tensor:
    """Garments in a random colour on a random plain background.

    grey is uint8 (N, H, W) with garments on black, as in Fashion-MNIST. Each channel of the
    background and of the garment's tint is uniform in the ranges given. With the defaults this
    is the "light backgrounds" test that the embedded bundle is measured on.
    Returns float32 (N, 3, H, W) in [0, 1].
    """
    shade = grey.float().unsqueeze(1) / 255
    garment = (grey > 8).float().unsqueeze(1)  # pixels outside the garment are 0, or nearly
    n = len(grey)
    colour = _uniform((n, 3, 1, 1), *tint, rng)
    backdrop = _uniform((n, 3, 1, 1), *background, rng)
    return garment * colour * (0.15 + 0.85 * shade) + (1 - garment) * backdrop


def augment(grey: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random pictures of the garments: colour, inversion, geometry, blur and noise.

    A third keep the data set's own look (grey on black). uint8 (N, H, W) -> float32
    (N, 3, H, W) in [0, 1].
    """
    n = len(grey)
    plain = to_rgb(grey)
    light = recolour(grey, rng, background=(0.55, 1.0), tint=(0.0, 1.0))
    any_ground = recolour(grey, rng, background=(0.0, 1.0), tint=(0.0, 1.0))
    look = torch.rand((n, 1, 1, 1), generator=rng)
    images = torch.where(look < 0.35, plain, torch.where(look < 0.75, light, any_ground))
    inverted = torch.rand((n, 1, 1, 1), generator=rng) < 0.1
    images = torch.where(inverted, 1 - images, images)
    return _photograph(_move(images, rng), rng)


def _move(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Random mirror, scale, aspect ratio, rotation and shift; what comes in repeats the border."""
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
    # Half of them stay where they are: the data set's own framing is the commonest picture.
    still = torch.rand((n, 1, 1), generator=rng) < 0.5
    identity = torch.eye(2, 3).expand(n, 2, 3) * torch.stack([mirror, torch.ones(n)], 1).unsqueeze(
        2
    )
    grid = F.affine_grid(
        torch.where(still, identity, theta), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _photograph(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """What a camera adds: blur, uneven light and sensor noise, each to some of the images."""
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
    "flip": flip,
    "crop": crop,
    "garments": garments,
}
