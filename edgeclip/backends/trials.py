"""Trials of a bundle's precisions on this machine: golden outputs and time, measured once and cached.

A precision that was right and fast where the bundle was made may be neither here. For example, int8
products of weights in eight bits saturate on x86-64 processors without VNNI.
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

RECIPE = 2  # raised whenever an older trial says nothing about this version
MIN_RUNS, SECONDS = 5, 0.2  # of timing

_lock = threading.Lock()  # trials at once would slow each other down


@dataclass(frozen=True)
class Trial:
    """The result for one precision."""

    problem: str  # why it must not be used here, or ""
    ms: float | None  # of one image, undisturbed; None where it was not timed
    error: EdgeclipError | None = None  # a failure, which may not come again

    def answers(self, timed: bool) -> bool:
        """Return whether this is enough of a trial: one that is right may have to be timed, too."""
        return bool(self.problem) or self.ms is not None or not timed


_memory: dict[str, dict[str, Trial]] = {}  # by the key's digest, for a process without a cache


def trials(
    bundle: Bundle, precisions: Sequence[str], device: str, threads: int, *, timed: bool
) -> dict[str, Trial]:
    """Return the trial of each precision in ONNX Runtime on `device`, cpu or cuda, with `threads`.

    A trial is made once for each bundle, ONNX Runtime, processor and number of threads, and cached.
    """
    key = _key(bundle, device, threads)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    with _lock:
        known = _memory.setdefault(digest, {})
        if _missing(known, precisions, timed):
            known |= _load(digest, key) | known
        missing = _missing(known, precisions, timed)
        found = {name: known[name] for name in precisions if name not in missing}
        if missing:
            logger.info("trying %s on this machine, once ...", " and ".join(missing))
        for name in missing:
            found[name] = trial = _try(bundle, name, device, threads, timed)
            host.trim_memory()  # of the encoders, which are released
            if trial.problem and timed:  # not asked for by its name, and not chosen
                reason = trial.problem
                logger.warning("%s: not using %s on this %s: %s", bundle.path, name, device, reason)
            if trial.error is None:
                known[name] = trial
                _store(digest, key, known)  # each as it comes: the next may not fit into memory
    return {name: found[name] for name in precisions}


def _missing(known: Mapping[str, Trial], precisions: Sequence[str], timed: bool) -> list[str]:
    return [n for n in precisions if n not in known or not known[n].answers(timed)]


def _key(bundle: Bundle, device: str, threads: int) -> dict[str, Any]:
    """Return everything that a trial's result depends on."""
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
    """Compare both encoders with their golden outputs, one after the other, and time the image's."""
    manifest, ms = bundle.manifest, None
    try:
        golden = GoldenValues(bundle)
        for kind, shape in (
            ("image", (3, *manifest.image.size)),
            ("text", (manifest.text.context_length,)),
        ):
            path = bundle.encoder(f"{kind}_encoder", precision)
            encoder = OnnxEncoder(path, device=device, threads=threads)
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
            del encoder  # before the next is opened
    except EdgeclipError as err:
        return Trial(str(err), None, err)
    return Trial("", ms)


def _time_ms(encoder: OnnxEncoder, pixels: NDArray[np.float32]) -> float:
    """Return the least milliseconds of one image: others are disturbed, or the first ones."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MIN_RUNS or time.perf_counter() - begin < SECONDS:
        start = time.perf_counter()
        encoder.embed(pixels)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def folder() -> Path | None:
    """Return where trials are kept, None where there is no cache."""
    parent = default_folder()
    return None if parent is None else parent / "trials"


def files() -> list[Path]:
    """Return the files of the cached trials: one for each bundle, ONNX Runtime and processor."""
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
    """Return the cached trials; none where there are none, or the file is damaged."""
    if (parent := folder()) is None:
        return {}
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        found = json.loads((parent / f"{digest}.json").read_bytes())
        if found["key"] == key:
            return {name: _trial(**entry) for name, entry in found["trials"].items()}
    return {}


def _trial(problem: str, ms: float | None) -> Trial:
    """Return a trial as it was stored. Raises TypeError for other types."""
    if not isinstance(problem, str) or not isinstance(ms, (float, type(None))):
        raise TypeError(problem, ms)
    return Trial(problem, ms)


def _store(digest: str, key: Mapping[str, Any], known: Mapping[str, Trial]) -> None:
    if (parent := folder()) is None:
        return  # said by default_folder
    rows = {name: {"problem": trial.problem, "ms": trial.ms} for name, trial in known.items()}
    found = {"key": key, "trials": rows}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        write(parent / f"{digest}.json", json.dumps(found, indent=2))
    except (OSError, EdgeclipError) as err:
        logger.warning(
            "cannot cache the trials of precisions (%s): each start repeats them; set "
            "EDGECLIP_CACHE to a folder that can be written",
            err,
        )


def best(found: Mapping[str, Trial], plainest: str, margin: float) -> str:
    """Return the fastest precision that is right; `plainest` unless another is faster by a margin.

    margin: the part of the plainest one's time that a faster one has to stay below. The trials of
    several precisions are timed ones. Raises DeviceError where none is right, or the EdgeclipError of
    the first where all of them failed.
    """
    right = [name for name, trial in found.items() if not trial.problem]
    errors = [trial.error for trial in found.values() if trial.error is not None]
    if len(errors) == len(found):
        raise errors[0]
    if not right:
        reasons = "; ".join(f"{name}: {trial.problem}" for name, trial in found.items())
        raise DeviceError(f"no precision gives its golden outputs ({reasons})")
    times = {name: found[name].ms or 0.0 for name in right}
    fastest = min(right, key=times.__getitem__)
    if plainest in times and times[fastest] >= margin * times[plainest]:
        return plainest
    return fastest
