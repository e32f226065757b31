"""Data sets of image folders: a user's own, and the ImageNet family."""

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

# Names of the folders and shards of a split; the first that exists is read.
SPLITS = {True: ("train",), False: ("test", "val", "valid", "validation")}
NAME_FILES = ("classes.txt", "classnames.txt")


def read_names(folder: Path) -> list[str] | None:
    """Read class names from classes.txt or classnames.txt, one per line; None without such a file.

    A line's number is a class index: unlike a label file, it has no comments, escapes or blank lines.
    Raises DataError.
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
    """Read FOLDER/<class>/..., all of it for either split, or FOLDER/<train|val|test>/<class>/....

    A class has the name of its folder, with spaces for underscores; lines of FOLDER/classes.txt, in
    the order of the sorted folder names, replace these names. Files that are left out are logged.
    Raises DataError for another layout, and for two classes of one name.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: name one that holds a folder of images per class")
    names, images = subfolders(folder), folder  # images: the folder of the class folders
    if _are_splits(folder, names):
        splits = [name for name in SPLITS[train] if name in names]
        if not splits:
            raise DataError(
                f"no {'training' if train else 'test'} images in {folder}: "
                f"expected {folder}/{SPLITS[train][0]}/<class>/"
            )
        images = folder / splits[0]
        # A class has the same index in both splits, even where one of them lacks it.
        names = sorted({name for split in names for name in subfolders(folder / split)})
    present = [name for name in names if (images / name).is_dir()]
    if not present:
        raise DataError(f"no class folders in {images}: expected {images}/<class name>/<images>")
    file_names = read_names(folder)
    classes = file_names or [class_names.words(name) for name in names]
    _check_names(folder, names, classes)
    listing = Listing()
    listing.left_out["outside the class folders"] = sum(
        len(listing.read(str(level), recursive=False)) for level in {folder, images}
    )
    listing.left_out[DEEPER] = 0  # the class folders are read below
    if file_names:
        listing.others[".txt"] -= 1  # the file of class names was read
    files = class_files([images / name for name in present], recursive=True, listing=listing)
    indices = [names.index(name) for name in present]
    return classes, ImageFiles(files.paths, np.array(indices)[files.labels])


def _are_splits(folder: Path, names: Sequence[str]) -> bool:
    """Tell whether folders of these names are splits, not classes. Raises DataError for a mixture."""
    known = {split for splits in SPLITS.values() for split in splits}
    splits = [name for name in names if name in known]
    others = [name for name in names if name not in known]
    if not splits or not others:
        return bool(splits)
    first = folder / splits[0]
    if len(splits) == 1 and (Listing().read(str(first), recursive=False) or not subfolders(first)):
        return False  # a class with the name of a split, such as train
    raise DataError(
        f"{folder} has {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} beside the split "
        f"{' and '.join(splits)}: move it elsewhere, or make it a class, <split>/<class>/<images>"
    )


def _check_names(folder: Path, names: Sequence[str], classes: Sequence[str]) -> None:
    """Raise DataError for more or fewer classes than folders, and for two classes of one folded name."""
    if len(classes) != len(names):
        raise DataError(
            f"{folder} names {len(classes)} classes in its text file and has {len(names)} folders: "
            "write one name per line, in the order of the sorted folder names"
        )
    folded = [class_names.fold(name) for name in classes]
    shared, count = Counter(folded).most_common(1)[0]
    if count > 1:
        same = [name for name, key in zip(names, folded, strict=True) if key == shared]
        raise DataError(
            f"{folder}: the folders {' and '.join(same)} are one class by name, {shared!r} "
            "(differences of case, white space and Unicode form do not count): merge them, "
            f"or give them different names in {NAME_FILES[0]}"
        )


def plain_classes(
    folder: Path, rename: Callable[[str], str], without: Sequence[str] = ()
) -> tuple[list[str], ImageFiles]:
    """Read FOLDER/<class>/<images> and rename the classes; folders in `without` are skipped."""
    names = [name for name in subfolders(folder) if name not in without]
    return [rename(name) for name in names], class_files([folder / name for name in names])


def wordnet_classes(candidates: Sequence[Path]) -> tuple[list[str], ImageFiles]:
    """Read FOLDER/<WordNet id>/<images> from the first of the folders that has such folders.

    The classes are in the order of the sorted ids, which is ImageNet's order. Raises
    FileNotFoundError where no folder has them.
    """
    for folder in filter(Path.is_dir, candidates):
        wnids = [name for name in subfolders(folder) if re.fullmatch(r"n\d{8}", name)]
        if wnids:
            files = class_files([folder / wnid for wnid in wnids])
            return class_names.imagenet(wnids), files
    raise FileNotFoundError


def tiny_imagenet(root: Path, train: bool) -> tuple[list[str], ImageFiles]:
    """Read TinyImageNet: wnids.txt, words.txt, train/<id>/images/, val/val_annotations.txt, val/images/.

    The test split is the validation images, because the images of test/ have no labels.
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
