"""Trials of a bundle's precisions on this machine: golden outputs and time, measured once and cached.

A precision that is exact and fast on one machine may be neither on another. For example, int8 products
of weights in eight bits saturate on x86-64 processors without VNNI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core, host
from edgeclip.backends.base import unit
from edgeclip.backends.golden_values import GoldenValues, embedding_limit, largest_distance
from edgeclip.backends.onnx_runtime import OnnxEncoder, import_onnxruntime
from edgeclip.bundle import Bundle
from edgeclip.errors import DeviceError, EdgeclipError
from edgeclip.storage import default_folder, write

logger = logging.getLogger(__name__)

RECIPE = 2  # increment to invalidate the trials of older versions
MIN_RUNS, MIN_SECONDS = 5, 0.2  # minimum effort of a timing

_lock = threading.Lock()  # concurrent trials would distort each other's timing


@dataclass(frozen=True)
class Trial:
    """Result of one precision's trial."""

    problem: str  # why the precision must not be used here, or ""
    ms: float | None  # best time of one image, in milliseconds; None: not timed
    error: EdgeclipError | None = None  # possibly transient failure, not cached

    def is_complete(self, timed: bool) -> bool:
        """Return whether the trial suffices; a precision without a problem may need a time."""
        return bool(self.problem) or self.ms is not None or not timed


_memory: dict[str, dict[str, Trial]] = {}  # digest of the key -> precision -> trial


def trials(
    bundle: Bundle, precisions: Sequence[str], device: str, threads: int, *, timed: bool
) -> dict[str, Trial]:
    """Return the trial of each precision in ONNX Runtime on `device`, cpu or cuda, with `threads`.

    Trials are cached by bundle, ONNX Runtime, processor and number of threads.
    """
    key = _key(bundle, device, threads)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with _lock:
        known = _memory.setdefault(digest, {})
        if _missing(known, precisions, timed):
            known |= _load(digest, key) | known
        missing = _missing(known, precisions, timed)
        results = {name: known[name] for name in precisions if name not in missing}
        if missing:
            logger.info("trying %s on this machine, once ...", " and ".join(missing))
        for name in missing:
            results[name] = trial = _try(bundle, name, device, threads, timed)
            host.trim_memory()  # the encoders' memory
            if trial.problem and timed:  # the caller warns about a precision that was named
                reason = trial.problem
                logger.warning("%s: not using %s on this %s: %s", bundle.path, name, device, reason)
            if trial.error is None:
                known[name] = trial
                _store(digest, key, known)  # one by one: the next may run out of memory
    return {name: results[name] for name in precisions}


def _missing(known: Mapping[str, Trial], precisions: Sequence[str], timed: bool) -> list[str]:
    return [n for n in precisions if n not in known or not known[n].is_complete(timed)]


def _key(bundle: Bundle, device: str, threads: int) -> dict[str, Any]:
    """Return everything that the result of a trial depends on."""
    return {
        "recipe": RECIPE,
        "bundle": bundle.digest,
        "onnxruntime": import_onnxruntime().__version__,
        "device": device,
        "processor": host.processor() if device == "cpu" else _gpu(),
        "threads": threads,
    }


def _gpu() -> str:
    if _core.cuda_built():
        gpu = _core.cuda_device()
        return f"{gpu['name']}, driver for CUDA {gpu['driver']}"
    return host.gpu()


def _try(bundle: Bundle, precision: str, device: str, threads: int, timed: bool) -> Trial:
    """Compare both encoders with their golden outputs, and time the image encoder."""
    manifest, ms = bundle.manifest, None
    try:
        golden = GoldenValues(bundle)
        for kind, shape in (
            ("image", (3, *manifest.image.size)),
            ("text", (manifest.text.context_length,)),
        ):
            path = bundle.encoder(f"{kind}_encoder", precision)
            expand = kind == "image"  # as they are opened for use
            encoder = OnnxEncoder(path, device=device, threads=threads, expand=expand)
            encoder.check_shapes(shape, manifest.embed_dim)
            inputs, expected = golden.encoder(kind)
            distance = largest_distance(unit(encoder.embed(inputs)), expected)
            limit = embedding_limit(manifest, precision, kind)
            if not distance <= limit:
                problem = (
                    f"golden {kind} embeddings differ by {distance:.3g}, more than {limit:.3g}"
                )
                return Trial(problem, None)
            if timed and kind == "image":
                ms = _time_ms(encoder, inputs)
            del encoder  # release its memory before the next is opened
    except EdgeclipError as err:
        return Trial(str(err), None, err)
    return Trial("", ms)


def _time_ms(encoder: OnnxEncoder, pixels: NDArray[np.float32]) -> float:
    """Return the shortest time of one image in milliseconds, which other processes disturb least."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MIN_RUNS or time.perf_counter() - begin < MIN_SECONDS:
        start = time.perf_counter()
        encoder.embed(pixels)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def folder() -> Path | None:
    """Return the folder of cached trials, None without a cache."""
    parent = default_folder()
    return None if parent is None else parent / "trials"


def files() -> list[Path]:
    """Return the files of the cached trials, one per key."""
    parent = folder()
    return [] if parent is None else sorted(parent.glob("*.json"))


def clear() -> int:
    """Delete all cached trials; return the bytes freed. Raises EdgeclipError."""
    freed = 0
    with _lock:
        _memory.clear()
    for file in files():
        try:
            freed += file.stat().st_size
            file.unlink(missing_ok=True)
        except OSError as err:
            raise EdgeclipError(f"cannot delete {file} ({err.strerror})") from err
    return freed


def _load(digest: str, key: Mapping[str, Any]) -> dict[str, Trial]:
    """Return the cached trials; {} if there are none, or the file is damaged."""
    if (parent := folder()) is None:
        return {}
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        record = json.loads((parent / f"{digest}.json").read_bytes())
        if record["key"] == key:
            return {name: _trial(**entry) for name, entry in record["trials"].items()}
    return {}


def _trial(problem: str, ms: float | None) -> Trial:
    """Return a cached trial. Raises TypeError for wrong types."""
    if not isinstance(problem, str) or not isinstance(ms, (float, type(None))):
        raise TypeError(problem, ms)
    return Trial(problem, ms)


def _store(digest: str, key: Mapping[str, Any], known: Mapping[str, Trial]) -> None:
    if (parent := folder()) is None:
        return  # default_folder has warned
    rows = {name: {"problem": trial.problem, "ms": trial.ms} for name, trial in known.items()}
    record = {"key": key, "trials": rows}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        write(parent / f"{digest}.json", json.dumps(record, indent=2))
    except (OSError, EdgeclipError) as err:
        logger.warning(
            "cannot cache the trials of precisions (%s), each start repeats them: set "
            "EDGECLIP_CACHE to a writable folder",
            err,
        )


def best(results: Mapping[str, Trial], reference: str, margin: float) -> str:
    """Return the fastest precision without a problem.

    The reference wins unless another takes less than `margin` of its time. Several trials must be
    timed ones. Raises DeviceError if every precision has a problem, or the first EdgeclipError if every
    trial failed.
    """
    usable = [name for name, trial in results.items() if not trial.problem]
    errors = [trial.error for trial in results.values() if trial.error is not None]
    if len(errors) == len(results):
        raise errors[0]
    if not usable:
        reasons = "; ".join(f"{name}: {trial.problem}" for name, trial in results.items())
        raise DeviceError(f"no precision reproduces the golden outputs ({reasons})")
    times = {name: results[name].ms or 0.0 for name in usable}
    fastest = min(usable, key=times.__getitem__)
    if reference in times and times[fastest] >= margin * times[reference]:
        return reference
    return fastest
