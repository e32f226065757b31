"""Data sets for training and zero-shot evaluation, each named as `name` or `name:path`.

    python -m train.data          which there are, and where their files are expected

The path is the folder that torchvision calls root; without one it is $EDGECLIP_DATA, or
`data` in edgeclip's cache folder (~/.cache/edgeclip). Nothing is downloaded unless that is asked for. One's own images are
`folder:PATH` (train.data.folders.read_folder) or `webdataset:PATTERN` (train.data.webdataset.read_shards).
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

__all__ = ["DataError", "DataSet", "load", "parse"]

OWN = {"folder": "PATH", "webdataset": "PATTERN"}


@dataclass(frozen=True)
class DataSet:
    """One split of a data set; a map-style data set for torch's DataLoader, which may pickle it.

    classes are in the words a person uses; each of the templates has {} for a class, and they are
    those of a zero-shot evaluation on this set.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """uint8 RGB (H, W, 3), not shared with others, and the index of its class.

        Raises DataError, with the index, for an image that cannot be read.
        """
        place = range(len(self))[index]
        try:
            image, label = self.samples[place]
        except (ImageError, OSError) as err:
            raise DataError(f"image {place} of {self.name} cannot be read: {err}") from err
        return np.array(image), label


def parse(spec: str) -> tuple[str, Path | None]:
    """The data set's name, whatever its spelling, and the path behind the colon, if there is one.

    Raises DataError for a name that is not known.
    """
    given, _, path = spec.partition(":")
    names = {_plain(name): name for name in (*SOURCES, *OWN)} | ALIASES
    name = names.get(_plain(given))
    if name is None:
        near = difflib.get_close_matches(_plain(given), names, n=1)
        known = [*SOURCES, *(f"{own}:{what}" for own, what in OWN.items())]
        raise DataError(
            f"unknown data set {given!r}"
            + (f", did you mean {names[near[0]]}?" if near else ":")
            + f" known are {', '.join(known)}"
        )
    if name in OWN and not path:
        raise DataError(f"{name} needs a path: write {name}:{OWN[name]}")
    return name, Path(path).expanduser() if path else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load(spec: str, *, train: bool, download: bool = False) -> DataSet:
    """The training or the test split of the data set `name[:path]`.

    Raises DataError where the name is unknown, the set has no such split, or its files are
    malformed, or missing and not to be downloaded.
    """
    name, path = parse(spec)
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
            "to train on some of them, sort these into folders of your own and name folder:PATH"
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
    """Class names and samples of a public data set, or a DataError that says what to do."""
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
        root = root.parents[len(parts) - 1]  # the folder itself was named
    download = download and not source.web
    get = f"get it from {source.web}" if source.web else "add --download"
    missing = (
        f"no {source.title} in {root}: expected {root / folder}; {get}, "
        f"or name the folder that it is in as {name}:FOLDER"
    )
    if not (download or source.flexible or (root / folder).is_dir()):
        raise DataError(missing)
    try:
        return source.read(root, train, download)
    except DataError:
        raise
    except Exception as err:  # loaders raise anything on malformed files
        if isinstance(err, FileNotFoundError) and err.filename is None:
            raise DataError(missing) from err
        what = " ".join(str(err).partition("You can use download=True")[0].split())
        doing = "downloaded and read" if download else "read"
        raise DataError(
            f"{source.title} in {root / folder} cannot be {doing} ({what or type(err).__name__}): "
            f"if it is incomplete or damaged, remove it and {get}"
        ) from err
