"""Files: their hashes, the cache's folder, and one writer that never leaves half a file.

An existing file is replaced in one step once its successor is complete. A file that is a mount
point, as in a container, cannot be replaced: the complete successor is copied into it. Pipes, devices
and open descriptors such as /dev/stdout cannot be replaced either, and are written straight into.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, TypeAlias

from edgeclip.errors import EdgeclipError

logger = logging.getLogger(__name__)

StrPath: TypeAlias = "str | PathLike[str]"

MAX_LINKS = 40  # Linux's own limit


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def default_folder() -> Path | None:
    """Return EDGECLIP_CACHE, else the user's cache folder; None, with a warning, without a home."""
    try:
        if folder := os.environ.get("EDGECLIP_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeclip"
    except RuntimeError:
        logger.warning("cache: no home directory; set EDGECLIP_CACHE to keep what was computed")
        return None


def write(path: StrPath, data: bytes | str) -> None:
    """Write a whole file, text as UTF-8; see `writing`."""
    with writing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def writing(path: StrPath | int) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` when the block ends, and only if it ends without an error.

    Links stay, and their target is replaced. The file's mode and owner stay where permitted. A file
    that is a mount point, which cannot be replaced, gets the bytes of the complete new one.
    What is no regular file (a pipe, a device, /dev/stdout, a descriptor as an int) is written
    straight into. Raises EdgeclipError, also for an OSError of the block; BrokenPipeError passes.
    """
    with _explained(path):
        place = _locate(path)
        if isinstance(place, int):
            with suppress(OSError, ValueError):
                sys.stdout.flush()  # what was printed before comes first
            place = os.dup(place)  # reopened by its path, a file would be truncated
        if isinstance(place, int) or _is_special(place):
            with io.BufferedWriter(_Stream(place, "wb")) as file:
                yield file
        else:
            with _draft(place) as part, open(part, "wb") as file:
                yield file


class _Stream(io.FileIO):
    """A file that is written from front to back.

    Zip files and others are written back and forth where that seems possible, which /dev/null and
    files opened for appending pretend.
    """

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("seek")


@contextmanager
def draft(path: StrPath) -> Iterator[Path]:
    """Yield the path of a temporary file, for a library that opens it itself; see `writing`."""
    with _explained(path):
        place = _locate(path)
        if isinstance(place, int):
            yield Path(f"/dev/fd/{place}")
        else:
            with _draft(place) as part:
                yield Path(part)


def replace(path: StrPath, finished: Path) -> None:
    """Put a finished file, of the same file system, where the regular file `path` is or will be.

    Links, modes and mount points as in `writing`. Raises EdgeclipError.
    """
    with _explained(path):
        place = _locate(path)
        if isinstance(place, int) or _is_special(place):
            raise OSError(errno.EINVAL, "it is no regular file")
        _replace(place, os.fspath(finished))


def is_stream(path: StrPath | int) -> bool:
    """Return whether `path` is written straight into: a pipe, a device, an open descriptor."""
    with _explained(path):
        place = _locate(path)
        return isinstance(place, int) or _is_special(place)


def is_stdout(path: StrPath | int) -> bool:
    """Return whether what is written to `path` comes out of this process's stdout."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(1))
    return False


def check_output(output: StrPath | int, inputs: Iterable[StrPath | int]) -> None:
    """Raise EdgeclipError where an output is one of the inputs, or a directory that holds one.

    Links, hard links and open descriptors are seen through. Devices and pipes may be both.
    """
    try:
        status = os.stat(output)
    except OSError:
        return  # it does not exist, or writing it says what is wrong
    for given in inputs:
        with suppress(OSError):
            if stat.S_ISREG(status.st_mode):
                same = os.path.samestat(status, os.stat(given))
            else:
                same = stat.S_ISDIR(status.st_mode) and _holds(output, given)
            if same:
                name = "standard input" if isinstance(given, int) else os.fspath(given)
                raise EdgeclipError(
                    f"cannot write {_name(output)}: that would destroy the input {name}; "
                    "name another output"
                )


def _holds(folder: StrPath | int, path: StrPath | int) -> bool:
    if isinstance(folder, int) or isinstance(path, int) or not os.path.exists(path):
        return False
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _name(path: StrPath | int) -> str:
    return "standard output" if isinstance(path, int) else os.fspath(path)


@contextmanager
def _explained(path: StrPath | int) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader has seen enough: no fault of the file
        raise
    except OSError as err:
        raise EdgeclipError(f"cannot write {_name(path)}: {err.strerror or err}") from err


def _locate(path: StrPath | int) -> str | int:
    """Follow links to what is written: a path, or a descriptor of this process. Raises OSError.

    The links of /proc/PID/fd are not followed: what they name may not be a file, or not there.
    """
    if isinstance(path, int):
        return path
    own = {os.path.realpath("/dev/fd"), os.path.realpath("/proc/self/fd")}
    found = os.fspath(path)
    for _ in range(MAX_LINKS):
        folder, name = os.path.split(found)
        folder = os.path.realpath(folder)
        if folder in own and name.isdecimal():
            return int(name)
        found = os.path.join(folder, name)
        if not name or os.path.isdir(found):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if folder.startswith("/proc/") or not os.path.islink(found):
            return found
        found = os.path.join(folder, os.readlink(found))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_special(place: str) -> bool:
    """Return whether a path exists and cannot be replaced."""
    try:
        return place.startswith("/proc/") or not stat.S_ISREG(os.stat(place).st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def _draft(place: str) -> Iterator[str]:
    """Yield the path of a new file that replaces `place`; `place` itself where it is special."""
    if _is_special(place):
        yield place
        return
    old = _replaceable(place)
    # Not of the tempfile module, whose files are for their owner alone: here the kernel applies the
    # umask, and nobody may read the successor of a private file in the meantime.
    part = os.path.join(os.path.dirname(place), f".edgeclip-{os.urandom(8).hex()}.tmp")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if old else 0o666))
    try:
        mode = stat.S_IMODE(os.stat(part).st_mode)
        yield part
        _replace(place, part, mode)  # a library may have made the file again, for its owner alone
    finally:
        with suppress(OSError):
            os.unlink(part)


def _replaceable(place: str) -> os.stat_result | None:
    """Return the status of the file to replace, None for none. Raises OSError for a read-only one."""
    try:
        with open(place, "r+b") as file:  # renaming would ask the folder alone
            return os.fstat(file.fileno())
    except FileNotFoundError:
        return None


def _replace(place: str, finished: str, mode: int | None = None) -> None:
    """Put a finished file in its place, with the old one's mode and owner, or a new one's mode."""
    old = _replaceable(place)
    # No link is followed, so that whoever may swap the file cannot have another one changed.
    with open(os.open(finished, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        _set_owner_and_mode(file.fileno(), old, mode)
        try:
            os.replace(finished, place)
        except OSError as err:
            if old is None or err.errno != errno.EBUSY:
                raise
            with open(place, "r+b") as target:  # a mount point
                shutil.copyfileobj(file, target)
                target.truncate()
            os.unlink(finished)


def _set_owner_and_mode(fd: int, old: os.stat_result | None, mode: int | None) -> None:
    """Set what is permitted: not all may give files away, and not all file systems have modes."""
    if old is not None:
        mode = stat.S_IMODE(old.st_mode)
        for owner in ((old.st_uid, -1), (-1, old.st_gid)):
            with suppress(OSError):
                os.fchown(fd, *owner)
    if mode is not None and mode != stat.S_IMODE(os.fstat(fd).st_mode):
        with suppress(OSError):
            os.fchmod(fd, mode)
