"""Images in WebDataset shards: tar files of `key.jpg` beside `key.cls`, with random access.

The headers are read once; then an image is a seek and a read, in any process.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeclip.errors import ImageError, LabelError
from edgeclip.images.decoding import decode
from edgeclip.images.formats import EXTRAS, SUFFIXES
from edgeclip.labels import read_lines
from train.data.folders import NAME_FILES, SPLITS, read_names
from train.errors import DataError

# Suffixes of all formats: decoding an image names the package that is missing for it.
IMAGES = {s.lstrip(".") for s in SUFFIXES.union(*(extra.suffixes for extra in EXTRAS))}
TEMPLATES = "zeroshot_classification_templates.txt"
MANY_SHARDS = 20  # scanning this many takes seconds, and shows a progress bar


@dataclass(frozen=True, eq=False)
class TarImages:
    """Images in tar files: for each, the index of its shard, its offset and size there, its label."""

    shards: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        shard, offset = self.shards[self.shard[index]], int(self.offset[index])
        # Opened for each image: a handle would not survive fork and pickle.
        with open(shard, "rb") as file:
            file.seek(offset)
            raw = file.read(int(self.size[index]))
        try:
            return decode(raw), int(self.labels[index])
        except ImageError as err:
            raise ImageError(f"{shard}, byte {offset}: {err}") from err


def read_shards(pattern: Path, train: bool) -> tuple[list[str], tuple[str, ...], TarImages]:
    """Read classes, templates (none without a file of templates) and images of a split.

    `pattern` is a glob or a range such as `test-{000..012}.tar`, whose shards are read for either
    split; or a folder with train/*.tar and test/*.tar, with train-*.tar and test-*.tar, or with *.tar
    for both splits. classes.txt or classnames.txt, beside the shards or in the folder above, names
    the classes. Raises DataError for another layout, and for malformed shards.
    """
    shards = _in_folder(pattern, train) if pattern.is_dir() else list(_matching(str(pattern)))
    parent = Path(shards[0]).parent
    for folder in (parent, parent.parent):
        classes = read_names(folder)
        if classes:
            samples = _scan(shards)
            top = int(samples.labels.max())
            if top >= len(classes):
                raise DataError(
                    f"{folder} names {len(classes)} classes, and the shards have label {top}: "
                    "name every class, one per line, the first for label 0"
                )
            return classes, _templates(folder / TEMPLATES), samples
    raise DataError(
        f"no class names in {parent}: write {NAME_FILES[0]} there, one class per line, "
        "the first for label 0"
    )


def _in_folder(folder: Path, train: bool) -> list[str]:
    """Return the shards of a split in a folder. Raises DataError."""
    pattern = glob.escape(str(folder))

    def find(split: str) -> list[str]:
        return sorted(
            glob.glob(f"{pattern}/{split}/*.tar") or glob.glob(f"{pattern}/{split}-*.tar")
        )

    if shards := next(filter(None, map(find, SPLITS[train])), None):
        return shards
    if any(map(find, SPLITS[not train])):
        raise DataError(
            f"no {'training' if train else 'test'} shards in {folder}: "
            f"expected {SPLITS[train][0]}/*.tar or {SPLITS[train][0]}-*.tar"
        )
    if shards := sorted(glob.glob(f"{pattern}/*.tar")):
        return shards
    raise DataError(f"no shards in {folder}: expected *.tar, train/*.tar or test/*.tar")


def _matching(pattern: str) -> Iterator[str]:
    """Yield the shards that match a pattern. Raises DataError where a part of it matches none."""
    for name in _expand(pattern):
        shards = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
        if not shards:
            raise DataError(f"no shard {name}: expected a folder, or tar files as in {pattern}")
        yield from shards


def _expand(pattern: str) -> Iterator[str]:
    """Expand the ranges of a pattern: `a-{08..11}.tar` -> a-08.tar, a-09.tar, a-10.tar, a-11.tar."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        if set("{}") & set(pattern):
            raise DataError(f"{pattern}: braces must hold a range such as {{000..012}}")
        yield pattern
        return
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"{pattern}: the range {match[0]} is empty; write the smaller number first")
    for number in range(int(first), int(last) + 1):
        yield from _expand(
            f"{pattern[: match.start()]}{number:0{len(first)}}{pattern[match.end() :]}"
        )


def _templates(file: Path) -> tuple[str, ...]:
    """Read the templates of a set made for CLIP_benchmark, where {c} stands for the class.

    Raises DataError.
    """
    if not file.is_file():
        return ()
    try:
        lines = [line.strip().replace("{c}", "{}") for line in read_lines(file)]
    except LabelError as err:
        raise DataError(str(err)) from err
    return tuple(line for line in lines if "{}" in line)


def _scan(shards: list[str]) -> TarImages:
    """Read the headers of all shards. Raises DataError."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = len(shards) < MANY_SHARDS or not console.is_terminal
    tables: list[np.ndarray] = []
    for index, shard in enumerate(
        track(shards, "reading shards", console=console, transient=True, disable=quiet)
    ):
        try:
            rows = [(index, *sample) for sample in _samples(shard)]
        except (tarfile.TarError, EOFError, OSError) as err:
            raise DataError(f"{shard} is no intact, uncompressed tar file: {err}") from err
        tables.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
    columns = np.concatenate(tables).T
    if not columns.size:
        raise DataError(f"no images in {shards[0]}: expected <key>.jpg beside <key>.cls")
    return TarImages(tuple(shards), *columns)


def _samples(shard: str) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and label of each image, in the order of the shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end = os.path.getsize(shard)
    with tarfile.open(shard, "r:") as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            key = f"{folder}/{stem}"
            if kind.lower() in IMAGES:
                if key in images:
                    raise DataError(f"{shard}: the sample {key.lstrip('/')} has two images")
                images[key] = member.offset_data, member.size
                if member.offset_data + member.size > end:
                    raise EOFError(f"it ends within {member.name}")
            elif kind.lower() == "cls":
                labels[key] = _label(tar, member, shard)
        # tarfile takes a damaged or missing header for the end of the file.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError(f"there is no member and no end at byte {tar.offset}")
    for key in sorted(images.keys() ^ labels.keys()):
        missing = ".cls with its class index" if key in images else "image (jpg, png, ...)"
        raise DataError(f"{shard}: the sample {key.lstrip('/')} has no {missing}")
    for key, (offset, size) in images.items():
        yield offset, size, labels[key]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> int:
    """Read a class index. Raises DataError."""
    file = tar.extractfile(member)
    raw = file.read() if file else b""
    try:
        label = int(raw)
    except ValueError as err:
        raise DataError(f"{shard}: {member.name} holds {raw[:20]!r}, not a class index") from err
    if label < 0:
        raise DataError(f"{shard}: {member.name} holds {label}; class indices start at 0")
    return label
