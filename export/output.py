"""Output of an export: files and directories that replace their target once complete."""

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
    """Raise ExportError unless a directory may be written at `out`.

    force: replace an existing directory, if the file `marker` shows that it is of this kind.
    """
    if out.is_file():
        raise ExportError(f"{out} is a file: name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / marker).is_file():
        raise ExportError(f"{out} is not empty and not a {kind}: name another directory")
    if not force:
        raise ExportError(f"{out} exists: add --force to replace it, or name another directory")


@contextmanager
def staging_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `out` that is always removed. Raise ExportError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as err:
        raise ExportError(f"cannot write {out}: {err.strerror}") from err
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, out: Path) -> None:
    """Move a complete staging directory to `out`; restore the previous directory if that fails."""
    apply_umask(staging)
    old = staging.with_name(staging.name + ".old")  # free: the name of `staging` is unique
    if out.exists():
        staging.chmod(stat.S_IMODE(out.stat().st_mode))
        out.rename(old)
    try:
        staging.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_graph_target(out: Path, force: bool, inputs: Iterable[Path | str]) -> None:
    """Raise EdgeclipError if `out` exists and `force` is false, or if it is one of `inputs`."""
    if storage.is_stream(out):
        return
    files = (out, _weights_file(out))
    if not files[1].parent.is_dir():
        raise ExportError(f"cannot write {out}: No such file or directory")
    for path in files:
        if path.exists() and not force:
            raise ExportError(f"{path} exists: add --force to replace it")
    inputs = list(inputs)
    for path in files:
        storage.check_output(path, inputs)


@contextmanager
def staged_graph(out: Path) -> Iterator[Path]:
    """Yield a path for a graph, which replaces `out` if the block ends without an error.

    The file of weights beside the graph is moved too. A pipe or a device takes a single file.
    """
    stream = storage.is_stream(out)
    target = Path(tempfile.gettempdir(), out.name) if stream else _resolve(out)
    with staging_directory(target) as staging:
        yield staging / target.name
        files = list(staging.iterdir())
        if stream and len(files) > 1:
            raise ExportError(f"{out} takes one file, but large weights need a second: name a file")
        apply_umask(staging)
        for file in files:
            if stream:
                with storage.writing(out) as destination, open(file, "rb") as source:
                    shutil.copyfileobj(source, destination)
            else:
                storage.replace(target.with_name(file.name), file)


def _weights_file(out: Path) -> Path:
    """Return the path of the weights beside the graph at `out`, whether or not it exists."""
    target = _resolve(out)
    return target.with_name(f"{target.name}.data")


def _resolve(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def apply_umask(folder: Path) -> None:
    """Set the umask's permissions recursively (tempfile and ONNX's weights are created 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
