"""Samples of a data set: images, decoded one at a time, and their class indices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeclip.errors import ImageError
from edgeclip.images.decoding import decode
from edgeclip.images.folders import Listing, is_skipped
from edgeclip.storage import default_folder
from train.errors import DataError


class Samples(Protocol):
    """Images, uint8 RGB (H, W, 3), and class indices. A broken image raises ImageError or OSError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...


def default_root() -> Path:
    """Return the folder of data sets: $EDGECLIP_DATA, else `data` in edgeclip's cache folder.

    Raises DataError without a home directory.
    """
    if folder := os.environ.get("EDGECLIP_DATA"):
        return Path(folder).expanduser()
    cache = default_folder()
    if cache is None:
        raise DataError("no home directory for data sets: set EDGECLIP_DATA to a folder")
    return cache / "data"


@dataclass(frozen=True, eq=False)
class GreyArrays:
    """Grey images in memory, uint8 (N, H, W), and integer labels (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.repeat(self.images[index][..., None], 3, axis=2), int(self.labels[index])


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files: their paths as bytes (N,), and int64 labels (N,).

    An array, not a list: each worker process would end up with a copy of a million strings.
    """

    paths: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, paths: Sequence[str], labels: Sequence[int]) -> ImageFiles:
        """Return the samples of paths and their labels."""
        return cls(
            np.array([os.fsencode(path) for path in paths], dtype=bytes),
            np.array(labels, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return decode(os.fsdecode(self.paths[index])), int(self.labels[index])


@dataclass(frozen=True, eq=False)
class TorchvisionSamples:
    """Data set of torchvision that returns PIL images, or arrays where `decode` is its loader."""

    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            image, label = self.data[index]
        except Exception as err:  # decoders raise any type for a broken file
            raise ImageError(str(err)) from err
        return decode(image), int(label)


def subfolders(folder: Path) -> list[str]:
    """Return the sorted names of a folder's subfolders, without hidden and system ones.

    Raises DataError for a dangling link that has the suffix of an image or none.
    """
    listing = Listing()
    entries = [entry for entry in os.scandir(folder) if not is_skipped(entry.name)]
    for entry in entries:
        if listing.is_lost(entry.path):
            raise DataError(f"{entry.path} is a link that leads nowhere: remove or repair it")
    return sorted(entry.name for entry in entries if entry.is_dir())


def class_files(
    folders: Sequence[Path], *, recursive: bool = False, listing: Listing | None = None
) -> ImageFiles:
    """Return the images in each folder, labelled with the folder's index.

    Files that were left out, here or earlier in `listing`, are logged in one line. Raises DataError
    for a folder without images, and for an unreadable one.
    """
    listing = listing or Listing()
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = listing.read(str(folder), recursive=recursive)
        if listing.unreadable:
            raise DataError(f"the folder {listing.unreadable[0]} cannot be read")
        if not files:
            raise DataError(
                f"no images in {folder}: remove the folder, or put its images there"
                + (f" ({summary})" if (summary := listing.summary()) else "")
            )
        paths += files
        labels += [label] * len(files)
    listing.report(os.path.commonpath(folders))
    return ImageFiles.of(paths, labels)
