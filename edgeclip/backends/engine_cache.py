"""Keys of TensorRT engines, and the folder that keeps those that were built and checked."""

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

RECIPE = 1  # to be raised whenever the same options build another engine


class Gpu(NamedTuple):
    """The GPU that an engine is for."""

    name: str  # such as "Orin"
    capability: tuple[int, int]  # such as (8, 7)


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for. Raises ValueError."""

    max_batch: int = 8  # rows of one call, from 1
    opt_batch: int = 1  # of images, those that kernels are tuned for: a camera's frame
    context_length: int = 77  # ids of a prompt, at most
    outputs: tuple[str, ...] = ()  # that the engine keeps, with what they need; empty: all
    # A Jetson's memory is the CPU's too, and TensorRT tries what fills it unless it is told not to.
    # An encoder's kernels want some ten MB for each image.
    workspace_bytes: int | None = 1 << 30
    optimization_level: int | None = None  # 0 to 5; None for TensorRT's own, 3

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
    """All that decides whether an engine that was built once can be used again."""

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
        """Hexadecimal digits, the same for equal keys only."""
        return hashlib.sha256(json.dumps(self.fields()).encode()).hexdigest()

    def fields(self) -> dict[str, Any]:
        """As JSON holds them."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found


@dataclass(frozen=True)
class Entry:
    """An engine in the cache."""

    path: Path
    key: Mapping[str, Any]  # EngineKey.fields()
    sha256: str
    checked: Mapping[str, Any]  # the report that it was saved with


class EngineCache:
    """Engines on disk: NAME.engine, and a JSON file beside with its key, its sha256 and its checks.

    folder: None for `engines` where edgeclip keeps what it computed (EDGECLIP_CACHE).
    The JSON file is written last and names its engine: what it leads to was stored complete, also
    where two processes build at once. A hash shows damage, not malice: TensorRT runs what is in an
    engine, so that the folder is the user's own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None and (parent := default_folder()) is not None:
            folder = parent / "engines"
        self.folder = folder

    def find(self, key: EngineKey) -> Path | None:
        """The engine, if it was stored complete, with its checks, and is intact."""
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
        """The engine that was stored last for a key as this one, whatever its options."""
        fields = {name: value for name, value in key.fields().items() if name != "options"}
        found = []
        for entry in self.entries():
            with suppress(OSError):
                if entry.checked and fields.items() <= dict(entry.key).items():
                    found.append((entry.path.stat().st_mtime, entry))
        for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True):
            with suppress(OSError):
                if sha256(entry.path) == entry.sha256:
                    return entry.path
            logger.warning("%s is damaged or missing: build it again", entry.path)
        return None

    def save(self, key: EngineKey, engine: bytes, report: Mapping[str, Any]) -> Path:
        """Keep an engine, and how it was checked: `report`, for JSON, such as golden differences.

        Raises EdgeclipError where it cannot be written, ValueError for an empty report.
        """
        if not report:
            raise ValueError("an engine is kept with the report of its checks, which is empty")
        folder, digest = self._needed(), hashlib.sha256(engine).hexdigest()
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
            if old is not None and old.path != path:  # what another process writes is not touched
                old.path.unlink(missing_ok=True)
        except OSError as err:
            raise EdgeclipError(f"cannot keep the engine in {folder} ({err.strerror})") from err
        return path

    def timing_cache(self, key: EngineKey) -> Path:
        """The file of kernel timings, which all engines of one TensorRT on one GPU share.

        Raises EdgeclipError where there is no cache.
        """
        major, minor = key.capability
        name = f"{key.module}-{key.version}-{key.device}-sm{major}{minor}"
        return self._needed() / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.timings"

    def entries(self) -> list[Entry]:
        """The engines that are there, which `find` may still reject."""
        files = [] if self.folder is None else sorted(self.folder.glob("*.json"))
        return [entry for file in files if (entry := _read_entry(file)) is not None]

    def remove(self) -> int:
        """Delete all engines and timings; bytes freed. Raises EdgeclipError."""
        freed = 0
        for pattern in ("*.json", "*.engine", "*.timings", "*.tmp"):
            for file in [] if self.folder is None else self.folder.glob(pattern):
                try:
                    freed += file.stat().st_size
                    file.unlink()
                except FileNotFoundError:  # another process was faster
                    continue
                except OSError as err:
                    raise EdgeclipError(f"cannot delete {file} ({err.strerror})") from err
        return freed

    def _needed(self) -> Path:
        if self.folder is None:
            raise EdgeclipError("no folder to keep engines in: set EDGECLIP_CACHE")
        return self.folder


def _stem(key: EngineKey) -> str:
    return key.digest[:32]


def _read_entry(file: Path) -> Entry | None:
    try:
        found = json.loads(file.read_bytes())
        name, digest, key, checked = (found[x] for x in ("engine", "sha256", "key", "checked"))
        if Path(name).name == name and isinstance(key, dict) and isinstance(checked, dict):
            return Entry(file.with_name(name), key, digest, checked)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
