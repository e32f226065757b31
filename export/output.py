"""Files that an export writes: graphs with their weights, and directories that are whole or not there."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeclip import storage
from export import ExportError


def check_target(out: Path, marker: str, kind: str, force: bool) -> None:
    """Raises ExportError where a directory cannot be put at `out`.

    One that is there already is replaced with `force`, if it has the file `marker` and so is of
    this kind.
    """
    if out.is_file():
        raise ExportError(f"{out} is a file: name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise ExportError(f"{out} is not empty and not a {kind}: name another directory")
    if not force:
        raise ExportError(f"{out} exists: add --force to replace it, or name another directory")


def check_graph_target(out: Path, force: bool, inputs: Iterable[Path | str]) -> None:
    """Raise EdgeclipError where `graph_draft` may not write: on a file without `force`, an input."""
    if storage.is_stream(out):
        return
    if not _data(out).parent.is_dir():
        raise ExportError(f"cannot write {out}: No such file or directory")
    for path in (out, _data(out)):
        if path.exists() and not force:
            raise ExportError(f"{path} exists: add --force to replace it")
    inputs = list(inputs)
    for path in (out, _data(out)):
        storage.check_output(path, inputs)


@contextmanager
def graph_draft(out: Path) -> Iterator[Path]:
    """Yield a path to write a graph to; it replaces `out` when the block ends without an error.

    A file of weights beside the graph follows it. A pipe or a device takes graphs of one file only.
    """
    stream = storage.is_stream(out)
    place = Path(tempfile.gettempdir(), out.name) if stream else Path(os.path.realpath(out))
    with workshop(place) as work:
        yield work / place.name
        written = list(work.iterdir())
        if stream and len(written) > 1:
            raise ExportError(f"{out} takes one file, and these weights need a second: name a file")
        let_all_in(work)
        for file in written:
            if stream:
                with storage.writing(out) as target, open(file, "rb") as source:
                    shutil.copyfileobj(source, target)
            else:
                storage.replace(place.with_name(file.name), file)


def _data(out: Path) -> Path:
    """Return the file of weights beside the graph at `out`, whether or not it exists."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.data")


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `out`, removed whatever happens. Raises ExportError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as err:
        raise ExportError(f"cannot write {out}: {err.strerror}") from err
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def move(work: Path, out: Path) -> None:
    """Put the finished `work` where `out` is, with its mode; what was there stays if that fails."""
    let_all_in(work)
    old = work.with_name(work.name + ".old")  # free, since the name of `work` is unique
    if out.exists():
        work.chmod(stat.S_IMODE(out.stat().st_mode))
        out.rename(old)
    try:
        work.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def let_all_in(folder: Path) -> None:
    """Give it and all in it the usual permissions: temporary directories, and weights beside a
    graph, are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
