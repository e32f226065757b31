"""Cache of TensorRT engines that were built and checked, and its keys."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edgeclip.errors import EdgeclipError
from edgeclip.storage import default_folder, sha256, write

logger = logging.getLogger(__name__)

RECIPE = 1  # increment whenever the same options build a different engine


class Gpu(NamedTuple):
    """The GPU that an engine is for."""

    name: str  # such as "Orin"
    capability: tuple[int, int]  # such as (8, 7)


@dataclass(frozen=True)
class BuildOptions:
    """Options of an engine's build. Raises ValueError."""

    max_batch: int = 8  # largest batch size, from 1
    opt_batch: int = 1  # batch size of images that kernels are tuned for: a camera's frame
    context_length: int = 77  # most ids of a prompt
    outputs: tuple[str, ...] = ()  # outputs that the engine keeps; empty: all
    # Without a limit TensorRT tries kernels that fill a Jetson's memory, which CPU and GPU share. An
    # encoder's kernels need about ten MB per image.
    workspace_bytes: int | None = 1 << 30
    optimization_level: int | None = None  # 0 to 5; None: TensorRT's default, 3

    def __post_init__(self) -> None:
        for name in ("max_batch", "opt_batch", "context_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.opt_batch > self.max_batch:
            raise ValueError(f"opt_batch {self.opt_batch} is above max_batch {self.max_batch}")
        if self.workspace_bytes is not None and self.workspace_bytes < 0:
            raise ValueError(f"workspace_bytes must not be negative, got {self.workspace_bytes}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ValueError(f"optimization_level must be 0 to 5, got {self.optimization_level}")


@dataclass(frozen=True)
class EngineKey:
    """Everything that a cached engine depends on."""

    graphs: tuple[str, ...]  # sha256 of the ONNX file and of its .data
    module: str
    version: str  # of TensorRT
    capability: tuple[int, int]
    device: str
    options: BuildOptions
    flags: tuple[str, ...]
    recipe: int = RECIPE

    @functools.cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the key."""
        return hashlib.sha256(json.dumps(self.fields()).encode()).hexdigest()

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields


@dataclass(frozen=True)
class Entry:
    """Cached engine."""

    path: Path
    key: Mapping[str, Any]  # EngineKey.fields()
    sha256: str
    checked: Mapping[str, Any]  # report of its checks


class EngineCache:
    """Engines on disk: NAME.engine, and a JSON file with its key, sha256 and checks.

    folder: None for `engines` in edgeclip's cache folder (EDGECLIP_CACHE).
    The JSON file names its engine and is written after it, so that the engine is complete even if two
    processes build at once. The hash reveals damage, not malice: TensorRT executes the content of an
    engine, so the folder must belong to the user.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None and (parent := default_folder()) is not None:
            folder = parent / "engines"
        self.folder = folder

    def find(self, key: EngineKey) -> Path | None:
        """Return the engine of `key` if it is present, checked and intact, else None."""
        if self.folder is None:
            return None
        entry = _read_entry(self.folder / f"{_stem(key)}.json")
        if entry is None or entry.key != key.fields() or not entry.checked:
            return None
        with suppress(OSError):
            if sha256(entry.path) == entry.sha256:
                return entry.path
        logger.warning("%s is damaged or missing: building it again", entry.path)
        return None

    def latest(self, key: EngineKey) -> Path | None:
        """Return the most recent engine matching `key`, ignoring options."""
        fields = {name: value for name, value in key.fields().items() if name != "options"}
        matches = []
        for entry in self.entries():
            with suppress(OSError):
                if entry.checked and fields.items() <= dict(entry.key).items():
                    matches.append((entry.path.stat().st_mtime, entry))
        for _, entry in sorted(matches, key=lambda pair: pair[0], reverse=True):
            with suppress(OSError):
                if sha256(entry.path) == entry.sha256:
                    return entry.path
            logger.warning("%s is damaged or missing: build it again", entry.path)
        return None

    def save(self, key: EngineKey, engine: bytes, report: Mapping[str, Any]) -> Path:
        """Store an engine with the report of its checks, and return its path.

        Raises EdgeclipError if the cache is not writable, ValueError for an empty report.
        """
        if not report:
            raise ValueError("expected the report of the engine's checks, got an empty one")
        folder, digest = self._required_folder(), hashlib.sha256(engine).hexdigest()
        path = folder / f"{_stem(key)}-{digest[:16]}.engine"
        entry = {
            "engine": path.name,
            "sha256": digest,
            "key": key.fields(),
            "checked": dict(report),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(path, engine)
            old = _read_entry(folder / f"{_stem(key)}.json")
            write(folder / f"{_stem(key)}.json", json.dumps(entry, indent=2))
            if old is not None and old.path != path:  # files of other processes are left alone
                old.path.unlink(missing_ok=True)
        except OSError as err:
            raise EdgeclipError(
                f"cannot write the engine to {folder} ({err.strerror}): set EDGECLIP_CACHE to a "
                "writable folder"
            ) from err
        return path

    def timing_cache(self, key: EngineKey) -> Path:
        """Return the file of kernel timings, shared by all engines of one TensorRT and GPU.

        Raises EdgeclipError without a cache folder.
        """
        major, minor = key.capability
        name = f"{key.module}-{key.version}-{key.device}-sm{major}{minor}"
        return self._required_folder() / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.timings"

    def entries(self) -> list[Entry]:
        """Return all entries, without checking their engines."""
        files = [] if self.folder is None else sorted(self.folder.glob("*.json"))
        return [entry for file in files if (entry := _read_entry(file)) is not None]

    def remove(self) -> int:
        """Delete all engines and timings; return the bytes freed. Raises EdgeclipError."""
        freed = 0
        for pattern in ("*.json", "*.engine", "*.timings", "*.tmp"):
            for file in [] if self.folder is None else self.folder.glob(pattern):
                try:
                    freed += file.stat().st_size
                    file.unlink()
                except FileNotFoundError:  # deleted by another process
                    continue
                except OSError as err:
                    raise EdgeclipError(f"cannot delete {file} ({err.strerror})") from err
        return freed

    def _required_folder(self) -> Path:
        if self.folder is None:
            raise EdgeclipError("no cache folder for engines: set EDGECLIP_CACHE")
        return self.folder


def _stem(key: EngineKey) -> str:
    return key.digest[:32]


def _read_entry(file: Path) -> Entry | None:
    try:
        record = json.loads(file.read_bytes())
        name, digest, key, checked = (record[x] for x in ("engine", "sha256", "key", "checked"))
        if Path(name).name == name and isinstance(key, dict) and isinstance(checked, dict):
            return Entry(file.with_name(name), key, digest, checked)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
