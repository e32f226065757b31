"""Fashion-MNIST and the pictures made of it: what the embedded model is trained and measured on."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from train.data.samples import default_root
from train.errors import DataError

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
