"""Fashion-MNIST and the pictures made of it: what the embedded model is trained and measured on."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from train.samples import DataError, default_root

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

# The first name of each class is its canonical one; the others are what people also call it.
FASHION_NAMES = (
    ("t-shirt", "tee", "top", "t-shirt or top", "tshirt", "short-sleeved top"),
    ("trousers", "trouser", "pants", "pair of trousers", "pair of pants", "slacks", "jeans"),
    ("pullover", "sweater", "jumper", "sweatshirt", "knitted pullover"),
    ("dress", "gown", "frock", "summer dress", "long dress"),
    ("coat", "jacket", "overcoat", "winter coat"),
    ("sandal", "sandals", "flip-flop", "pair of sandals", "open-toed shoe", "high-heeled sandal"),
    ("shirt", "blouse", "button-up shirt", "dress shirt", "long-sleeved shirt"),
    ("sneaker", "trainer", "running shoe", "tennis shoe", "gym shoe", "sports shoe"),
    ("bag", "handbag", "purse", "tote bag", "shoulder bag"),
    ("ankle boot", "boot", "bootie", "leather boot", "ankle-high boot"),
)
FASHION_CLASSES = tuple(names[0] for names in FASHION_NAMES)
FASHION_TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}.",
    "a picture of a {}.",
    "a {}.",
    "{}",
    "an image of the {}.",
    "a product photo of a {}.",
    "a small picture of some {}.",
    "a blurry photo of the {}.",
    "my {}.",
)


@dataclass(frozen=True)
class Split:
    """One split of a data set: uint8 images (N, H, W), grey, and int64 labels (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]


def load_split(spec: str, *, train: bool, download: bool = False) -> Split:
    """The split of `fashion-mnist[:folder]`, for what is made for this data set alone.

    Raises DataError where another data set is named, or its files are missing or broken.
    """
    name, _, path = spec.partition(":")
    if name != "fashion-mnist":
        raise DataError(f"{name!r} does not work here: only fashion-mnist[:folder] does")
    return read_split(Path(path).expanduser() if path else None, train, download)


def read_split(folder: Path | None, train: bool, download: bool) -> Split:
    """The split in `folder`: Debian's files or torchvision's; None looks where both usually are."""
    prefix = "train" if train else "t10k"
    kinds = ("images-idx3", "labels-idx1")
    files = [(folder or DEBIAN_FASHION_MNIST) / f"{prefix}-{kind}-ubyte.gz" for kind in kinds]
    if all(file.is_file() for file in files):
        try:
            images, labels = (_read_idx(file) for file in files)
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as err:
            raise DataError(f"Fashion-MNIST in {files[0].parent} is damaged: {err}") from err
        return Split(torch.from_numpy(images), torch.from_numpy(labels).long(), FASHION_CLASSES)
    return _torchvision_fashion_mnist(folder or default_root(), train, download)


def _read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of the MNIST family: magic, one int32 per dimension, the bytes."""
    with gzip.open(path) as file:
        raw = file.read()
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", count=ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape).copy()


def _torchvision_fashion_mnist(root: Path, train: bool, download: bool) -> Split:
    from torchvision.datasets import FashionMNIST

    try:
        data = FashionMNIST(str(root), train=train, download=download)
    except (RuntimeError, OSError) as err:
        if download:
            reason = " ".join(str(err).split())
            raise DataError(f"Fashion-MNIST cannot be downloaded to {root}: {reason}") from err
        raise DataError(
            f"no Fashion-MNIST in {root}: install Debian's dataset-fashion-mnist, name its folder "
            "as fashion-mnist:FOLDER, or add --download"
        ) from err
    return Split(data.data, data.targets.long(), FASHION_CLASSES)


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
