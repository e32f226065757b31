"""Data sets for training and zero-shot evaluation, named as `name` or `name:path`.

    python -m train.data          list the data sets and the folders of their files

The path is the folder that torchvision calls root; the default is $EDGECLIP_DATA, or
`data` in edgeclip's cache folder (~/.cache/edgeclip). A download needs `download`. A user's own images are `folder:PATH`
(train.data.folders.read_folder) or `webdataset:PATTERN` (train.data.webdataset.read_shards).
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeclip.errors import ImageError
from train.data.catalog import ALIASES, DEFAULT, SOURCES
from train.data.folders import read_folder
from train.data.samples import Samples, default_root
from train.data.webdataset import read_shards
from train.errors import DataError

# Data sets of a user's own images, and the path that each needs.
USER_SETS = {"folder": "PATH", "webdataset": "PATTERN"}


@dataclass(frozen=True)
class DataSet:
    """One split of a data set: a map-style data set for torch's DataLoader, which may pickle it.

    classes: their names in everyday words. templates: prompts of a zero-shot evaluation on this set,
    with {} for the class.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return a copy of an image, uint8 RGB (H, W, 3), and the index of its class.

        Raises DataError, with the index, for an image that cannot be read.
        """
        position = range(len(self))[index]
        try:
            image, label = self.samples[position]
        except (ImageError, OSError) as err:
            raise DataError(f"image {position} of {self.name} cannot be read: {err}") from err
        return np.array(image), label


def parse(spec: str) -> tuple[str, Path | None]:
    """Split `name[:path]` into the data set's name, in its own spelling, and the path, if any.

    Raises DataError for an unknown name.
    """
    spelling, _, path = spec.partition(":")
    names = {_plain(name): name for name in (*SOURCES, *USER_SETS)} | ALIASES
    name = names.get(_plain(spelling))
    if name is None:
        near = difflib.get_close_matches(_plain(spelling), names, n=1)
        known = [*SOURCES, *(f"{user_set}:{needed}" for user_set, needed in USER_SETS.items())]
        raise DataError(
            f"unknown data set {spelling!r}"
            + (f", did you mean {names[near[0]]}?" if near else ":")
            + f" known are {', '.join(known)}"
        )
    if name in USER_SETS and not path:
        raise DataError(f"{name} needs a path: write {name}:{USER_SETS[name]}")
    return name, Path(path).expanduser() if path else None


def _plain(name: str) -> str:
    """Reduce a name to its lower-case letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load(spec: str, *, train: bool, download: bool = False) -> DataSet:
    """Load the training or the test split of the data set `name[:path]`.

    Raises DataError for an unknown name or split, for malformed files, and, without `download`, for
    missing ones.
    """
    name, path = parse(spec)
    classes: Sequence[str]
    samples: Samples
    if path and name == "folder":
        classes, samples = read_folder(path, train)
        return DataSet(name, tuple(classes), DEFAULT, samples)
    if path and name == "webdataset":
        classes, templates, samples = read_shards(path, train)
        return DataSet(name, tuple(classes), templates or DEFAULT, samples)

    source = SOURCES[name]
    if train and not source.trains:
        raise DataError(
            f"{source.title} has no official training split, all its images are for evaluation: "
            "to train on some of them, copy these into folders of your own and name folder:PATH"
        )
    classes, samples = _read(name, path, train, download)
    if len(classes) != source.count:
        raise DataError(
            f"{source.title} has {source.count} classes, but {len(classes)} are in "
            f"{path or default_root()}: unpack it again"
        )
    return DataSet(name, tuple(classes), source.templates, samples)


def _read(
    name: str, path: Path | None, train: bool, download: bool
) -> tuple[Sequence[str], Samples]:
    """Read class names and samples of a public data set. Raises DataError."""
    source = SOURCES[name]
    if source.needs:
        try:
            importlib.import_module(source.needs)
        except ImportError as err:
            needed = f"{source.title} needs {source.needs}: pip install {source.needs}"
            raise DataError(needed) from err
    root = path or default_root()
    folder = Path(source.folder)
    parts = folder.parts
    if root.parts[-len(parts) :] == parts and not (root / folder).is_dir():
        root = root.parents[len(parts) - 1]  # the path names the folder itself
    download = download and not source.web
    get = f"get it from {source.web}" if source.web else "add --download"
    missing = (
        f"no {source.title} in {root}: expected {root / folder}; {get}, "
        f"or name the folder that holds it, as {name}:FOLDER"
    )
    if not (download or source.flexible or (root / folder).is_dir()):
        raise DataError(missing)
    try:
        return source.read(root, train, download)
    except DataError:
        raise
    except Exception as err:  # readers raise any type for malformed files
        if isinstance(err, FileNotFoundError) and err.filename is None:
            raise DataError(missing) from err
        reason = " ".join(str(err).partition("You can use download=True")[0].split())
        action = "downloaded and read" if download else "read"
        raise DataError(
            f"{source.title} in {root / folder} cannot be {action} ({reason or type(err).__name__}): "
            f"if it is incomplete or damaged, remove it and {get}"
        ) from err
