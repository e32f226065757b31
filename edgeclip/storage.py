"""File hashes, the cache folder, and atomic writes.

A new version is written to a temporary file, which replaces the existing file once it is complete.
A mount point, as in a container, cannot be replaced: the complete bytes are copied into it. Pipes,
devices and open descriptors such as /dev/stdout cannot be replaced either: they are written directly.
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

MAX_LINKS = 40  # Linux's limit


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def default_folder() -> Path | None:
    """Return the folder of all that edgeclip caches.

    $EDGECLIP_CACHE, else $XDG_CACHE_HOME/edgeclip, else ~/.cache/edgeclip. Without a home directory
    None, with a warning.
    """
    try:
        if folder := os.environ.get("EDGECLIP_CACHE"):
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeclip"
    except RuntimeError:
        logger.warning("cache: no home directory; set EDGECLIP_CACHE to keep what was computed")
        return None


def write(path: StrPath, data: bytes | str) -> None:
    """Write a whole file atomically, text as UTF-8; see `writing`."""
    with writing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def writing(path: StrPath | int) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` when the block ends without an error.

    A link stays, and its target is replaced. The file keeps its mode and owner where permitted. The
    complete bytes are copied into a mount point, which cannot be replaced. A pipe, a device,
    /dev/stdout or a descriptor (an int) is written directly.
    Raises EdgeclipError, also for an OSError in the block. BrokenPipeError is not converted.
    """
    with _convert_errors(path):
        target = _resolve(path)
        if isinstance(target, int):
            with suppress(OSError, ValueError):
                sys.stdout.flush()  # earlier output comes first
            target = os.dup(target)  # reopened by its path, a file would be truncated
        if isinstance(target, int) or _is_special(target):
            with io.BufferedWriter(_Stream(target, "wb")) as file:
                yield file
        else:
            with _temporary(target) as temporary, open(temporary, "wb") as file:
                yield file


class _Stream(io.FileIO):
    """A file that refuses to seek.

    Zip and some other writers seek where they can. /dev/null and files opened for appending claim
    that they can, and ignore it.
    """

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("seek")


@contextmanager
def draft(path: StrPath) -> Iterator[Path]:
    """Yield the path of a temporary file, for a library that opens files by path; see `writing`."""
    with _convert_errors(path):
        target = _resolve(path)
        if isinstance(target, int):
            yield Path(f"/dev/fd/{target}")
        else:
            with _temporary(target) as temporary:
                yield Path(temporary)


def replace(path: StrPath, finished: Path) -> None:
    """Move a finished file to `path`, a regular file or none, on the same file system.

    Links, modes and mount points are handled as in `writing`. Raises EdgeclipError.
    """
    with _convert_errors(path):
        target = _resolve(path)
        if isinstance(target, int) or _is_special(target):
            raise OSError(errno.EINVAL, "it is not a regular file")
        _replace(target, os.fspath(finished))


def is_stream(path: StrPath | int) -> bool:
    """Return whether `path` is written directly: a pipe, a device or an open descriptor."""
    with _convert_errors(path):
        target = _resolve(path)
        return isinstance(target, int) or _is_special(target)


def is_stdout(path: StrPath | int) -> bool:
    """Return whether `path` is this process's stdout, under any name."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(1))
    return False


def check_output(output: StrPath | int, inputs: Iterable[StrPath | int]) -> None:
    """Raise EdgeclipError if the output is one of the inputs, or a directory that contains one.

    Links, hard links and open descriptors are resolved. A device or pipe may be both.
    """
    try:
        status = os.stat(output)
    except OSError:
        return  # a missing file destroys nothing, and the write explains other errors
    for source in inputs:
        with suppress(OSError):
            if stat.S_ISREG(status.st_mode):
                same = os.path.samestat(status, os.stat(source))
            else:
                same = stat.S_ISDIR(status.st_mode) and _contains(output, source)
            if same:
                name = "standard input" if isinstance(source, int) else os.fspath(source)
                raise EdgeclipError(
                    f"cannot write {_name(output)}: that would destroy the input {name}; "
                    "name another output"
                )


def _contains(folder: StrPath | int, path: StrPath | int) -> bool:
    if isinstance(folder, int) or isinstance(path, int) or not os.path.exists(path):
        return False
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _name(path: StrPath | int) -> str:
    return "standard output" if isinstance(path, int) else os.fspath(path)


@contextmanager
def _convert_errors(path: StrPath | int) -> Iterator[None]:
    """Raise an OSError of the block as an EdgeclipError that names the file."""
    try:
        yield
    except BrokenPipeError:  # the reader stopped early, which is no error of the file
        raise
    except OSError as err:
        raise EdgeclipError(f"cannot write {_name(path)}: {err.strerror or err}") from err


def _resolve(path: StrPath | int) -> str | int:
    """Follow links and return the path to write, or a descriptor of this process. Raises OSError.

    Links in /proc/PID/fd are not followed, since their targets need not be existing files.
    """
    if isinstance(path, int):
        return path
    descriptors = {os.path.realpath("/dev/fd"), os.path.realpath("/proc/self/fd")}
    target = os.fspath(path)
    for _ in range(MAX_LINKS):
        folder, name = os.path.split(target)
        folder = os.path.realpath(folder)
        if folder in descriptors and name.isdecimal():
            return int(name)
        target = os.path.join(folder, name)
        if not name or os.path.isdir(target):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if folder.startswith("/proc/") or not os.path.islink(target):
            return target
        target = os.path.join(folder, os.readlink(target))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _is_special(path: str) -> bool:
    """Return whether a path exists and cannot be replaced."""
    try:
        return path.startswith("/proc/") or not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


@contextmanager
def _temporary(target: str) -> Iterator[str]:
    """Yield the path of a new file that replaces `target`; `target` itself if it is special."""
    if _is_special(target):
        yield target
        return
    old = _replaceable(target)
    # The tempfile module would make a new file private. Here the kernel applies the umask to a new
    # file, and the new version of an existing file is private until it is complete.
    temporary = os.path.join(os.path.dirname(target), f".edgeclip-{os.urandom(8).hex()}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if old else 0o666))
    try:
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        yield temporary
        _replace(target, temporary, mode)  # a library may have created the file again, as private
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def _replaceable(path: str) -> os.stat_result | None:
    """Return the status of an existing file, or None. Raises OSError for a read-only file."""
    try:
        with open(path, "r+b") as file:  # a rename would check the folder's permissions only
            return os.fstat(file.fileno())
    except FileNotFoundError:
        return None


def _replace(target: str, finished: str, mode: int | None = None) -> None:
    """Move a finished file to `target`, with the mode and owner of the old file, else with `mode`."""
    old = _replaceable(target)
    # A link is not followed: whoever may swap the file could have another file's mode changed.
    with open(os.open(finished, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        _set_owner_and_mode(file.fileno(), old, mode)
        try:
            os.replace(finished, target)
        except OSError as err:
            if old is None or err.errno != errno.EBUSY:
                raise
            with open(target, "r+b") as mounted:  # a mount point
                shutil.copyfileobj(file, mounted)
                mounted.truncate()
            os.unlink(finished)


def _set_owner_and_mode(fd: int, old: os.stat_result | None, mode: int | None) -> None:
    """Set owner and mode where the user and the file system permit it."""
    if old is not None:
        mode = stat.S_IMODE(old.st_mode)
        for owner in ((old.st_uid, -1), (-1, old.st_gid)):
            with suppress(OSError):
                os.fchown(fd, *owner)
    if mode is not None and mode != stat.S_IMODE(os.fstat(fd).st_mode):
        with suppress(OSError):
            os.fchmod(fd, mode)
