"""Catalogue of the public data sets: their files, readers, class names and templates.

The splits are the official ones. ImageNet and TinyImageNet are tested on their validation images. The
validation images of Flowers-102 and DTD (partition 1) are in neither split; those of Oxford-IIIT Pet
and FGVC-Aircraft are training images. Sets without an official split (SUN397, EuroSAT, Caltech-101,
Caltech-256) have a test split of all images, and no training split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.images.decoding import decode
from train.data import class_names, fashion_mnist
from train.data.folders import plain_classes, tiny_imagenet, wordnet_classes
from train.data.samples import (
    GreyArrays,
    ImageFiles,
    Samples,
    TorchvisionSamples,
    class_files,
    default_root,
)
from train.errors import DataError

# (root, train, download) -> class names and samples. A FileNotFoundError without a file name means
# that the data set is missing.
Read = Callable[[Path, bool, bool], tuple[Sequence[str], Samples]]

DEFAULT = ("This is a photo of a {}",)


@dataclass(frozen=True)
class Source:
    """A public data set.

    count: number of classes. folder: folder of its files, relative to the root. flexible: `read` also
    looks in the root itself. web: address for a manual download; empty where torchvision downloads.
    needs: a package that this set alone needs. trains: whether it has a training split.
    """

    title: str
    count: int
    folder: str
    read: Read
    templates: tuple[str, ...] = DEFAULT
    flexible: bool = False
    web: str = ""
    needs: str = ""
    trains: bool = True


def _torchvision(name: str, root: Path, download: bool, **options: Any) -> Any:
    """Open a data set of torchvision by its class name."""
    from torchvision import datasets

    with warnings.catch_warnings():
        # NumPy 2.4.0 to 2.4.4 warns about the old pickles of CIFAR.
        warnings.filterwarnings("ignore", message=r"dtype\(\): align")
        return getattr(datasets, name)(str(root), download=download, **options)


def _torchvision_set(
    loader: str,
    train: dict[str, Any],
    test: dict[str, Any],
    rename: Callable[[str], str] = class_names.words,
) -> Read:
    """Return the reader of a torchvision set; train and test are its options for each split."""

    def read(root: Path, training: bool, download: bool) -> tuple[Sequence[str], Samples]:
        data = _torchvision(loader, root, download, **(train if training else test))
        return [rename(name) for name in data.classes], TorchvisionSamples(data)

    return read


def _class_folders(
    loader: str, folder: str, rename: Callable[[str], str], without: Sequence[str] = ()
) -> Read:
    """Return the reader of a set of class folders, which torchvision only downloads.

    Files are sorted, so that their order is the same on every machine, and errors name the file.
    """

    def read(root: Path, training: bool, download: bool) -> tuple[Sequence[str], Samples]:
        if download:
            _torchvision(loader, root, True)
        return plain_classes(root / folder, rename, without)

    return read


def _sun397(root: Path, train: bool, download: bool) -> tuple[Sequence[str], Samples]:
    if download:
        _torchvision("SUN397", root, True)
    folder = root / "SUN397"
    rows = (folder / "ClassName.txt").read_text().split()  # as in /a/apartment_building/outdoor
    classes = [class_names.sun397(row[3:]) for row in rows]
    return classes, class_files([folder / row[1:] for row in rows])


def _pets(root: Path, train: bool, download: bool) -> tuple[Sequence[str], Samples]:
    """Read the list of a split: torchvision's reader of this set takes no loader."""
    if download:
        _torchvision("OxfordIIITPet", root, True)
    folder = root / "oxford-iiit-pet"
    split = "trainval" if train else "test"
    lines = (folder / "annotations" / f"{split}.txt").read_text().splitlines()
    rows = [line.split() for line in lines]  # as in "great_pyrenees_36 16 2 7"
    breeds = {int(row[1]): row[0].rpartition("_")[0] for row in rows}
    paths = [str(folder / "images" / f"{row[0]}.jpg") for row in rows]
    labels = [int(row[1]) - 1 for row in rows]
    classes = [class_names.words(breeds[label]).title() for label in sorted(breeds)]
    return classes, ImageFiles.of(paths, labels)


def _flowers(root: Path, train: bool, download: bool) -> tuple[Sequence[str], Samples]:
    data = _torchvision("Flowers102", root, download, **(_TRAIN_FILES if train else _TEST_FILES))
    if not hasattr(data, "classes"):
        raise DataError(
            "the class names of Flowers-102 need a newer torchvision: pip install -U torchvision"
        )
    return [class_names.flower(name) for name in data.classes], TorchvisionSamples(data)


def _wordnet(*folders: str) -> Read:
    """Return the reader of an ImageNet-like set, in the first of the folders with class folders."""

    def read(root: Path, train: bool, download: bool) -> tuple[Sequence[str], Samples]:
        split = "train" if train else "val"
        return wordnet_classes([root / folder.format(split=split) for folder in folders])

    return read


@dataclass(frozen=True, eq=False)
class Patches:
    """Images of PCAM in an HDF5 file, and their labels (N,).

    torchvision's loader cannot be pickled. The file is opened for each image, because HDF5 handles
    do not survive a fork.
    """

    file: Path
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        import h5py

        with h5py.File(self.file) as images:
            image: np.ndarray = images["x"][index]
            return image, int(self.labels[index])


def _pcam(root: Path, train: bool, download: bool) -> tuple[Sequence[str], Samples]:
    import h5py

    split = "train" if train else "test"
    _torchvision("PCAM", root, download, split=split)
    stem = root / "pcam" / f"camelyonpatch_level_2_split_{split}"
    with h5py.File(f"{stem}_y.h5") as labels:
        return class_names.PCAM, Patches(Path(f"{stem}_x.h5"), labels["y"][:].reshape(-1))


def _fashion_mnist(root: Path, train: bool, download: bool) -> tuple[Sequence[str], Samples]:
    # Without a folder, Debian's package is read too.
    split = fashion_mnist.read_split(None if root == default_root() else root, train, download)
    return split.classes, GreyArrays(split.images.numpy(), split.labels.numpy())


_TRAIN, _TEST = {"split": "train"}, {"split": "test"}
# edgeclip decodes image files, as everywhere here; torchvision's own loader refuses some.
_TRAIN_FILES, _TEST_FILES, _TRAINVAL_FILES = (
    {"split": split, "loader": decode} for split in ("train", "test", "trainval")
)

SOURCES = {
    "tiny-imagenet": Source(
        "TinyImageNet", 200, "tiny-imagenet-200", lambda root, train, _: tiny_imagenet(root, train),
        flexible=True, web="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ),
    "cifar10": Source(
        "CIFAR-10", 10, "cifar-10-batches-py",
        _torchvision_set("CIFAR10", {"train": True}, {"train": False}),
    ),
    "cifar100": Source(
        "CIFAR-100", 100, "cifar-100-python",
        _torchvision_set("CIFAR100", {"train": True}, {"train": False}),
    ),
    "stl10": Source("STL-10", 10, "stl10_binary", _torchvision_set("STL10", _TRAIN, _TEST)),
    "sun397": Source(
        "SUN397", 397, "SUN397", _sun397, ("a photo of a {}.", "a photo of the {}."), trains=False,
    ),
    "food101": Source(
        "Food-101", 101, "food-101", _torchvision_set("Food101", _TRAIN_FILES, _TEST_FILES),
        ("a photo of {}, a type of food.",),
    ),
    "pets": Source(
        "Oxford-IIIT Pet", 37, "oxford-iiit-pet", _pets,
        ("a photo of a {}, a type of pet.",),
    ),
    "flowers102": Source(
        "Flowers-102", 102, "flowers-102", _flowers, ("a photo of a {}, a type of flower.",),
        needs="scipy",
    ),
    "dtd": Source(
        "DTD", 47, "dtd/dtd", _torchvision_set("DTD", _TRAIN_FILES, _TEST_FILES),
        ("a photo of a {} texture.", "a photo of a {} pattern."),
    ),
    "eurosat": Source(
        "EuroSAT", 10, "eurosat/2750",
        _class_folders("EuroSAT", "eurosat/2750", class_names.EUROSAT.__getitem__),
        ("a satellite photo of {}.",), trains=False,
    ),
    "fgvc-aircraft": Source(
        "FGVC-Aircraft", 100, "fgvc-aircraft-2013b",
        _torchvision_set("FGVCAircraft", _TRAINVAL_FILES, _TEST_FILES),
        ("a photo of a {}, a type of aircraft.",),
    ),
    "imagenet": Source(
        "ImageNet", 1000, "imagenet/{train,val}/<WordNet id>",
        _wordnet("imagenet/{split}", "{split}"),
        flexible=True, web="https://image-net.org",
    ),
    "imagenet-r": Source(
        "ImageNet-R", 200, "imagenet-r/<WordNet id>", _wordnet("imagenet-r", ""),
        ("a rendition of a {}.", "This is a photo of a {}"),
        flexible=True, web="https://github.com/hendrycks/imagenet-r", trains=False,
    ),
    "imagenet-sketch": Source(
        "ImageNet-Sketch", 1000, "imagenet-sketch/sketch/<WordNet id>",
        _wordnet("imagenet-sketch/sketch", "imagenet-sketch", "sketch", ""),
        ("a sketch of a {}.", "a black and white drawing of a {}."),
        flexible=True, web="https://github.com/HaohanWang/ImageNet-Sketch", trains=False,
    ),
    "caltech101": Source(
        "Caltech-101", 101, "caltech101/101_ObjectCategories",
        _class_folders("Caltech101", "caltech101/101_ObjectCategories", class_names.caltech,
               without=["BACKGROUND_Google"]),
        trains=False,
    ),
    "caltech256": Source(
        "Caltech-256", 256, "caltech256/256_ObjectCategories",
        _class_folders("Caltech256", "caltech256/256_ObjectCategories", class_names.caltech,
               without=["257.clutter"]),
        trains=False,
    ),
    "cars": Source(
        "Stanford Cars", 196, "stanford_cars", _torchvision_set("StanfordCars", _TRAIN_FILES, _TEST_FILES),
        ("a photo of a {}.", "a photo of a {}, a type of car."),
        web="https://github.com/pytorch/vision/issues/7545", needs="scipy",
    ),
    "pcam": Source(
        "PCAM", 2, "pcam", _pcam, ("this is a photo of {}", "a histopathology image of {}"),
        needs="h5py",
    ),
    "fashion-mnist": Source(
        "Fashion-MNIST", 10, "FashionMNIST/raw", _fashion_mnist, fashion_mnist.FASHION_TEMPLATES,
        flexible=True,
    ),
}  # fmt: skip

ALIASES = {
    "tinyimagenet200": "tiny-imagenet",
    "oxfordiiitpet": "pets",
    "oxfordpets": "pets",
    "flowers": "flowers102",
    "oxfordflowers102": "flowers102",
    "aircraft": "fgvc-aircraft",
    "imagenet1k": "imagenet",
    "stanfordcars": "cars",
    "patchcamelyon": "pcam",
}
