"""Data sets of image folders: one's own, and those of the ImageNet family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgeclip.errors import LabelError
from edgeclip.images.folders import DEEPER, Listing
from edgeclip.labels import read_lines
from train.data import class_names
from train.data.samples import ImageFiles, class_files, subfolders
from train.errors import DataError

# What the folders and the shards of a split are called; the first that is there is taken.
SPLITS = {True: ("train",), False: ("test", "val", "valid", "validation")}
NAME_FILES = ("classes.txt", "classnames.txt")


def read_names(folder: Path) -> list[str] | None:
    """Read class names from classes.txt or classnames.txt, one per line; None without such a file.

    A line's number is a class index: there are no comments, escapes or blank lines as in a label
    file. Raises DataError.
    """
    for file in (folder / name for name in NAME_FILES):
        if file.is_file():
            try:
                names = [line.strip() for line in read_lines(file)]
            except LabelError as err:
                raise DataError(str(err)) from err
            while names and not names[-1]:
                names.pop()
            if not names or not all(names):
                raise DataError(f"{file} has an empty line: expected one class name per line")
            return names
    return None


def read_folder(folder: Path, train: bool) -> tuple[list[str], ImageFiles]:
    """Read FOLDER/<class>/..., whole for either split, or FOLDER/<train|val|test>/<class>/....

    A class is named as its folder, with spaces for underscores, or by the line of
    FOLDER/classes.txt that has its place among the sorted folder names. What was left out is
    logged. Raises DataError for what is not laid out so, and for classes of the same name.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: name one that holds a folder of images per class")
    names, images = subfolders(folder), folder
    if _are_splits(folder, names):
        splits = [name for name in SPLITS[train] if name in names]
        if not splits:
            raise DataError(
                f"no {'training' if train else 'test'} images in {folder}: "
                f"expected {folder}/{SPLITS[train][0]}/<class>/"
            )
        images = folder / splits[0]
        # A class keeps its index where another split has no image of it.
        names = sorted({name for split in names for name in subfolders(folder / split)})
    present = [name for name in names if (images / name).is_dir()]
    if not present:
        raise DataError(f"no class folders in {images}: expected {images}/<class name>/<images>")
    named = read_names(folder)
    classes = named or [class_names.words(name) for name in names]
    _check_names(folder, names, classes)
    listing = Listing()
    listing.left_out["outside the class folders"] = sum(
        len(listing.read(str(level), recursive=False)) for level in {folder, images}
    )
    listing.left_out[DEEPER] = 0  # the class folders, which are read below
    if named:
        listing.others[".txt"] -= 1  # the names, which were read
    files = class_files([images / name for name in present], recursive=True, listing=listing)
    place = [names.index(name) for name in present]
    return classes, ImageFiles(files.paths, np.array(place)[files.labels])


def _are_splits(folder: Path, names: Sequence[str]) -> bool:
    """Whether folders of these names are splits, not classes. Raises DataError for both at once."""
    known = {split for splits in SPLITS.values() for split in splits}
    splits = [name for name in names if name in known]
    others = [name for name in names if name not in known]
    if not splits or not others:
        return bool(splits)
    first = folder / splits[0]
    if len(splits) == 1 and (Listing().read(str(first), recursive=False) or not subfolders(first)):
        return False  # a class that is called as a split is
    raise DataError(
        f"{folder} has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} beside the split "
        f"{' and '.join(splits)}: move it away, or make a class of it, <split>/<class>/<images>"
    )


def _check_names(folder: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    """Raise DataError where classes are not as many as their folders, or share a folded name."""
    if len(classes) != len(names):
        raise DataError(
            f"{folder} names {len(classes)} classes in its text file and has {len(names)} folders: "
            "write one name per line, in the order of the sorted folder names"
        )
    folded = [class_names.fold(name) for name in classes]
    shared, count = Counter(folded).most_common(1)[0]
    if count > 1:
        same = [name for name, known_as in zip(names, folded, strict=True) if known_as == shared]
        raise DataError(
            f"{folder}: the folders {' and '.join(same)} are one class by name, {shared!r} "
            "(differences of case, white space and Unicode form do not count): put them together, "
            f"or name them apart in {NAME_FILES[0]}"
        )


def plain_classes(
    folder: Path, rename: Callable[[str], str], without: Sequence[str] = ()
) -> tuple[list[str], ImageFiles]:
    """FOLDER/<class>/<images>, whose classes are renamed; folders in `without` are no classes."""
    names = [name for name in subfolders(folder) if name not in without]
    return [rename(name) for name in names], class_files([folder / name for name in names])


def wordnet_classes(candidates: Sequence[Path]) -> tuple[list[str], ImageFiles]:
    """FOLDER/<WordNet id>/<images> in the first of the folders that has such folders.

    Sorted ids are ImageNet's own order. Raises FileNotFoundError where no folder has them.
    """
    for folder in filter(Path.is_dir, candidates):
        wnids = [name for name in subfolders(folder) if re.fullmatch(r"n\d{8}", name)]
        if wnids:
            files = class_files([folder / wnid for wnid in wnids])
            return class_names.imagenet(wnids), files
    raise FileNotFoundError


def tiny_imagenet(root: Path, train: bool) -> tuple[list[str], ImageFiles]:
    """wnids.txt, words.txt, train/<id>/images/, val/val_annotations.txt, val/images/.

    The test split is the validation images: those of test/ have no labels.
    """
    folder = next(
        (f for f in (root / "tiny-imagenet-200", root) if (f / "wnids.txt").is_file()), None
    )
    if folder is None:
        raise FileNotFoundError
    wnids = (folder / "wnids.txt").read_text().split()
    lines = [line.split("\t") for line in read_lines(folder / "words.txt")]
    others = {line[0]: line[1].partition(",")[0] for line in lines if len(line) > 1}
    classes = class_names.imagenet(wnids, others)
    if train:
        return classes, class_files([folder / "train" / wnid / "images" for wnid in wnids])
    rows = read_lines(folder / "val" / "val_annotations.txt")
    files, labels = zip(*(row.split("\t")[:2] for row in rows), strict=True)
    paths = [str(folder / "val" / "images" / file) for file in files]
    return classes, ImageFiles.of(paths, [wnids.index(wnid) for wnid in labels])
