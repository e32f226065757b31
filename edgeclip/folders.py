"""Image files in folders, by one rule for the command line and for data sets.

Files are taken by their suffix, links to files and folders are followed, and each folder is read once.
Hidden ones, and those of a system or a thumbnailer, are left out. What is left out is counted.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable

from edgeclip.formats import EXTRAS, suffixes

logger = logging.getLogger(__name__)

SYSTEM = frozenset(
    {"@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"}
)
HIDDEN, DEEPER = "hidden or system", "below a class folder"
SHOWN = 3  # suffixes of other files in a report
LONGEST = 8  # characters of such a suffix


def is_skipped(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or belongs to a system or a thumbnailer."""
    return name.startswith(".") or name in SYSTEM


def expand(arguments: Iterable[str]) -> list[str]:
    """Return the image files named by paths, directories (recursive, sorted) and glob patterns.

    An argument that names no image, and a directory that cannot be read, stays as it is, so that
    `decode` says what is wrong with it. What was left out of directories is logged in one line.
    """
    listing = Listing()
    files: list[str] = []
    folders: list[str] = []
    for argument in arguments:
        for path in _matching(argument) or [argument]:
            if os.path.isdir(path):
                folders.append(path)
                files += listing.read(path) or [path]
            else:
                files.append(path)
    listing.report(folders[0] if len(folders) == 1 else f"{len(folders)} folders")
    return files


def _matching(argument: str) -> list[str]:
    """Return the paths that a pattern stands for, as a shell would; another argument as it is."""
    if not glob.has_magic(argument) or os.path.lexists(argument):
        return [argument]
    found = sorted(filter(_is_ordinary, glob.glob(argument, recursive=True)))
    # ** stands for what is in the folders too.
    return [path for path in found if not os.path.isdir(path)] if "**" in argument else found


def _is_ordinary(path: str) -> bool:
    """Whether a path is a file, a folder or a dangling link: a pipe would be waited for."""
    return os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path)


class Listing:
    """The images of folders, and counts of what was left out of them."""

    def __init__(self) -> None:
        self.unreadable: list[str] = []  # folders
        self.left_out: Counter[str] = Counter()  # by the reason
        self.others: Counter[str] = Counter()  # files that are no pictures, by their suffix
        self._known = suffixes()
        self._missing = {
            suffix: f"{suffix} ({extra.install})"
            for extra in EXTRAS
            for suffix in extra.suffixes
            if suffix not in self._known
        }

    def read(self, folder: str, *, recursive: bool = True) -> list[str]:
        """Return the images in a folder, and the folders that cannot be read, as sorted paths."""
        found: list[str] = []
        unreadable: list[str] = []
        seen: set[tuple[int, int]] = set()
        waiting = deque([folder])  # a link's folder comes after all that are there themselves
        while waiting:
            walk = os.walk(
                waiting.popleft(), onerror=lambda err: unreadable.append(str(err.filename))
            )
            for parent, below, names in walk:
                status = os.stat(parent)
                if (status.st_dev, status.st_ino) in seen:
                    below.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                found += filter(self._is_image, (os.path.join(parent, name) for name in names))
                below[:] = self._to_enter(below, recursive)
                paths = (os.path.join(parent, name) for name in below)
                waiting += filter(os.path.islink, paths)
        self.unreadable += unreadable
        return sorted(found + unreadable)

    def _to_enter(self, below: list[str], recursive: bool) -> list[str]:
        """Return the folders to read of those in a folder, in an order that is always the same."""
        entered = sorted(name for name in below if not is_skipped(name))
        self.left_out[HIDDEN] += len(below) - len(entered)
        if not recursive:
            self.left_out[DEEPER] += len(entered)
        return entered if recursive else []

    def _is_image(self, path: str) -> bool:
        name = os.path.basename(path)
        suffix = os.path.splitext(name)[1].lower()
        if is_skipped(name):
            self.left_out[HIDDEN] += 1
        elif os.path.isfile(path):
            if suffix in self._known:
                return True
            if suffix in self._missing:
                self.left_out[self._missing[suffix]] += 1
            else:
                self.others[suffix] += 1
        elif not os.path.exists(path) and (suffix in self._known or not suffix):
            return True  # a dangling link to an image or a folder, for `decode` to name
        else:
            self.others[suffix] += 1
        return False

    def summary(self) -> str:
        """Return the counts and reasons in one line; empty where nothing was left out."""
        parts = [f"{count} {reason}" for reason, count in (+self.left_out).most_common()]
        if self.others:
            kinds = [_shown(suffix) for suffix, _ in self.others.most_common(SHOWN)]
            more = ["..."] if len(self.others) > SHOWN else []
            parts.append(f"{self.others.total()} not a picture ({', '.join(kinds + more)})")
        total = self.left_out.total() + self.others.total()
        return f"left out {total}: {', '.join(parts)}" if parts else ""

    def report(self, place: str) -> None:
        """Log what was left out of the folders at this place, in one line."""
        if summary := self.summary():
            logger.warning("%s: %s", place, summary)


def _shown(suffix: str) -> str:
    if not suffix:
        return "no suffix"
    return suffix if suffix[1:].isalnum() and len(suffix) <= LONGEST else "other suffixes"
