"""Image files in folders, by the same rules for the command line and for data sets.

Files are selected by suffix, links to files and folders are followed, and each folder is read once.
Hidden files and folders, and those of an operating system or a thumbnailer, are skipped and counted.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from edgeclip.images.formats import EXTRAS, suffixes

logger = logging.getLogger(__name__)

SYSTEM = frozenset(
    {"@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", "lost+found"}
)
HIDDEN, DEEPER = "hidden or system", "below a class folder"
MAX_SUFFIXES = 3  # of other files in a report
CURRENT = os.path.join(os.curdir, "")
MAX_SUFFIX_LENGTH = 8  # characters
ANY_DEPTH = re.compile(
    r"((?:.*?/)??)(\*\*(?:/.*)?)", re.DOTALL
)  # the part before the first ** and the rest


def is_skipped(name: str) -> bool:
    """Return whether a file or folder name is hidden, or reserved by a system or thumbnailer."""
    return name.startswith(".") or name in SYSTEM


def expand(arguments: Iterable[str]) -> list[str]:
    """Return the image files named by paths, directories (recursive, sorted) and glob patterns.

    An argument that names no image, and a directory that cannot be read, is returned unchanged, so
    that `decode` reports the reason. Skipped files are logged in one line.
    """
    listing = Listing()
    files: list[str] = []
    folders: list[str] = []
    for argument in arguments:
        matches: list[str] = []
        for path, patterns in _roots(argument):
            if os.path.isdir(path):
                folders.append(path)
                images = listing.read(path, patterns) or ([] if patterns else [path])
                if path == os.curdir and patterns:  # for example `**/*.png`, which names no folder
                    images = [image.removeprefix(CURRENT) for image in images]
                matches += images
            else:
                matches.append(path)
        files += matches or [argument]
    listing.report(folders[0] if len(folders) == 1 else f"{len(folders)} folders")
    return files


def _roots(argument: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the paths that an argument names, and the patterns for names below each path.

    The part before ** is expanded as by a shell. The rest is matched against the images below:
    `glob` would follow links without end and enter folders of thumbnailers.
    """
    if not glob.has_magic(argument) or os.path.lexists(argument):
        return [(argument, ())]
    if not (match := ANY_DEPTH.fullmatch(argument)):
        return [(path, ()) for path in sorted(glob.glob(argument)) if _is_ordinary(path)]
    top, rest = match[1] or os.curdir, match[2]
    patterns = tuple(filter(None, rest.split("/")))
    return [(path, patterns) for path in ([top] if os.path.isdir(top) else sorted(glob.glob(top)))]


def _is_ordinary(path: str) -> bool:
    """Return whether a path is a file, a folder or a dangling link, but no pipe, which would block."""
    return os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path)


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether a path, or one of its parent folders, matches patterns of names.

    ** matches any number of names, every other pattern matches one name.
    """
    if not patterns:
        return True
    if patterns[0] == "**":
        return any(_fits(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatch(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


class Listing:
    """Images of folders, and counts of the skipped files."""

    def __init__(self) -> None:
        self.unreadable: list[str] = []  # folders
        self.left_out: Counter[str] = Counter()  # by reason
        self.others: Counter[str] = Counter()  # files that are no images, by suffix
        self._known = suffixes()
        self._missing = {
            suffix: f"{suffix} ({extra.install})"
            for extra in EXTRAS
            for suffix in extra.suffixes
            if suffix not in self._known
        }

    def read(
        self, folder: str, patterns: Sequence[str] = (), *, recursive: bool = True
    ) -> list[str]:
        """Return the images in a folder, and the folders that cannot be read, as sorted paths.

        patterns: globs of the names below the folder, ** for any depth; files that do not match
        are not counted as skipped.
        """
        images: list[str] = []
        unreadable: list[str] = []
        visited: set[tuple[int, int]] = set()
        top = os.path.join(folder, "")
        pending = deque([folder])  # folders behind links are read after all others
        while pending:
            walk = os.walk(
                pending.popleft(), onerror=lambda err: unreadable.append(str(err.filename))
            )
            for parent, below, names in walk:
                status = os.stat(parent)
                if (status.st_dev, status.st_ino) in visited:
                    below.clear()
                    continue
                visited.add((status.st_dev, status.st_ino))
                paths = [os.path.join(parent, name) for name in names]
                matching = (p for p in paths if _fits(p.removeprefix(top).split("/"), patterns))
                images += filter(self._is_image, matching)
                below[:] = self._to_enter(below, recursive)
                pending += filter(os.path.islink, (os.path.join(parent, name) for name in below))
        self.unreadable += unreadable
        return sorted(images + unreadable)

    def _to_enter(self, below: list[str], recursive: bool) -> list[str]:
        """Return the subfolders to read, sorted."""
        entered = sorted(name for name in below if not is_skipped(name))
        self.left_out[HIDDEN] += len(below) - len(entered)
        if not recursive:
            self.left_out[DEEPER] += len(entered)
        return entered if recursive else []

    def _is_image(self, path: str) -> bool:
        """Return whether a file is to be read; count it if not."""
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
        elif self.is_lost(path):
            return True  # `decode` reports it
        else:
            self.others[suffix] += 1
        return False

    def is_lost(self, path: str) -> bool:
        """Return whether a path is a dangling link, with the suffix of an image or none."""
        suffix = os.path.splitext(path)[1].lower()
        return not os.path.exists(path) and (not suffix or suffix in self._known)

    def summary(self) -> str:
        """Return the counts and reasons in one line, empty if nothing was skipped."""
        parts = [f"{count} {reason}" for reason, count in (+self.left_out).most_common()]
        if others := +self.others:
            kinds = [_suffix_text(suffix) for suffix, _ in others.most_common(MAX_SUFFIXES)]
            more = ["..."] if len(others) > MAX_SUFFIXES else []
            parts.append(f"{others.total()} not a picture ({', '.join(kinds + more)})")
        total = self.left_out.total() + self.others.total()
        return f"left out {total}: {', '.join(parts)}" if parts else ""

    def report(self, place: str) -> None:
        """Log the skipped files of a place in one line."""
        if summary := self.summary():
            logger.warning("%s: %s", place, summary)


def _suffix_text(suffix: str) -> str:
    if not suffix:
        return "no suffix"
    return suffix if suffix[1:].isalnum() and len(suffix) <= MAX_SUFFIX_LENGTH else "other suffixes"
