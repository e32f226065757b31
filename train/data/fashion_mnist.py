"""Fashion-MNIST, the data set of the embedded model: its files, class names and templates."""

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

# The first name of each class is the canonical one; the others are synonyms.
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
    """One split: grey images, uint8 (N, H, W), and labels, int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]


def load_split(spec: str, *, train: bool, download: bool = False) -> Split:
    """Load a split of `fashion-mnist[:folder]`, for a command that works with this data set alone.

    Raises DataError for the name of another data set, and for missing or damaged files.
    """
    name, _, path = spec.partition(":")
    if name != "fashion-mnist":
        raise DataError(f"{name!r} does not work here: only fashion-mnist[:folder] does")
    return read_split(Path(path).expanduser() if path else None, train, download)


def read_split(folder: Path | None, train: bool, download: bool) -> Split:
    """Read a split from `folder`, in Debian's or torchvision's files; None: the default folders of both.

    Raises DataError for missing or damaged files.
    """
    prefix = "train" if train else "t10k"
    kinds = ("images-idx3", "labels-idx1")
    files = [(folder or DEBIAN_FASHION_MNIST) / f"{prefix}-{kind}-ubyte.gz" for kind in kinds]
    if all(file.is_file() for file in files):
        try:
            images, labels = (_read_idx(file) for file in files)
            if len(images) != len(labels):
                raise ValueError(f"it has {len(images)} images and {len(labels)} labels")
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as err:
            raise DataError(f"Fashion-MNIST in {files[0].parent} is damaged: {err}") from err
        return Split(torch.from_numpy(images), torch.from_numpy(labels).long(), FASHION_CLASSES)
    return _torchvision_fashion_mnist(folder or default_root(), train, download)


def _read_idx(path: Path) -> np.ndarray:
    """Read a uint8 array in MNIST's IDX format: magic number, an int32 per dimension, the values.

    torchvision's reader takes no compressed file, as Debian ships them.
    """
    with gzip.open(path) as file:
        raw = file.read()
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", count=ndim, offset=4).tolist()
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim)
    return np.array(values.reshape(shape))


def _torchvision_fashion_mnist(root: Path, train: bool, download: bool) -> Split:
    """Read a split from torchvision's files. Raises DataError."""
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
