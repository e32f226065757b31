"""Trials of a bundle's precisions on this machine: golden outputs and time, measured once and cached.

A precision that was right and fast where the bundle was made may be neither here. For example, int8
products of weights in eight bits saturate on x86-64 processors without VNNI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip import _core, host
from edgeclip.bundle import Bundle
from edgeclip.encoders import OnnxEncoder, import_onnxruntime, unit
from edgeclip.errors import DeviceError, EdgeclipError
from edgeclip.golden_values import GoldenValues, embedding_limit, largest_distance
from edgeclip.storage import default_folder, write

logger = logging.getLogger(__name__)

RECIPE = 1  # raised whenever an older trial says nothing about this version
ROUNDS, MIN_ROUNDS = 5, 2
BUDGET = 2.0  # seconds, after which no further round of timing begins


@dataclass(frozen=True)
class Trial:
    """The result for one precision."""

    problem: str  # why it must not be used here, or ""
    ms: float | None  # median time of one image, None where it was not timed
    lasting: bool = True  # False for a failure of the device, which may work another time

    def answers(self, timed: bool) -> bool:
        """Return whether this is enough of a trial: one that is right may have to be timed, too."""
        return bool(self.problem) or self.ms is not None or not timed


_memory: dict[str, dict[str, Trial]] = {}  # by the key's digest, for a process without a cache


def trials(
    bundle: Bundle, precisions: Sequence[str], device: str, threads: int, *, timed: bool
) -> dict[str, Trial]:
    """Return the trial of each precision in ONNX Runtime on `device`, cpu or cuda, with `threads`.

    A trial is made once for each bundle, ONNX Runtime, processor and number of threads, and kept in
    the cache folder. Raises DeviceError where the device does not work, BundleError.
    """
    key = _key(bundle, device, threads)
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    if digest not in _memory:
        _memory[digest] = _load(digest, key)
    known = _memory[digest]
    if not all(name in known and known[name].answers(timed) for name in precisions):
        found = _run(bundle, precisions, device, threads, timed)
        host.trim_memory()  # of the encoders, all of which are released
        known.update({name: trial for name, trial in found.items() if trial.lasting})
        _store(digest, key, known)
        return found
    return {name: known[name] for name in precisions}


def _key(bundle: Bundle, device: str, threads: int) -> dict[str, Any]:
    """Everything that a trial's result depends on."""
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


def _run(
    bundle: Bundle, precisions: Sequence[str], device: str, threads: int, timed: bool
) -> dict[str, Trial]:
    logger.info("trying %s on this machine, once ...", " and ".join(precisions))
    golden = GoldenValues(bundle)
    encoders, problems, failed = {}, {}, set()
    for name in precisions:
        encoders[name] = _open(bundle, name, "image_encoder", device, threads)
        texts = _open(bundle, name, "text_encoder", device, threads)
        try:
            problems[name] = _problem(bundle, name, golden, encoders[name], texts)
        except DeviceError as err:
            problems[name] = str(err)
            failed.add(name)
        if problems[name] and timed:  # it was not asked for by its name, and is not chosen
            logger.warning(
                "%s: not using %s on this %s: %s", bundle.path, name, device, problems[name]
            )
    good = {name: encoders[name] for name in precisions if not problems[name]}
    times = _times_ms(good, golden.pixels[None]) if timed else {}
    return {n: Trial(problems[n], times.get(n), n not in failed) for n in precisions}


def _open(bundle: Bundle, precision: str, kind: str, device: str, threads: int) -> OnnxEncoder:
    manifest = bundle.manifest
    encoder = OnnxEncoder(bundle.encoder(kind, precision), device=device, threads=threads)
    inputs = (
        (3, *manifest.image.size) if kind == "image_encoder" else (manifest.text.context_length,)
    )
    encoder.check_shapes(inputs, manifest.embed_dim)
    return encoder


def _problem(
    bundle: Bundle,
    precision: str,
    golden: GoldenValues,
    image_encoder: OnnxEncoder,
    text_encoder: OnnxEncoder,
) -> str:
    """Describe how the golden outputs are missed; "" where they are met."""
    limit = embedding_limit(bundle.manifest, precision)
    for kind, encoder, inputs, expected in (
        ("image", image_encoder, golden.pixels[None], golden.embedding[None]),
        ("text", text_encoder, golden.ids, golden.text_embeddings),
    ):
        distance = largest_distance(unit(encoder.embed(inputs)), expected)
        if not distance <= limit:
            return f"golden {kind} embeddings differ by {distance:.3g}, more than {limit:.3g}"
    return ""


def _times_ms(encoders: Mapping[str, OnnxEncoder], pixels: NDArray[np.float32]) -> dict[str, float]:
    """Return the median milliseconds of one image by each encoder; they take turns.

    Each has run before. A run right before the timed one lets its own threads wake up.
    """
    times: dict[str, list[float]] = {name: [] for name in encoders}
    begin = time.perf_counter()
    for done in range(ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > BUDGET:
            break
        for name, encoder in encoders.items():
            encoder.embed(pixels)
            start = time.perf_counter()
            encoder.embed(pixels)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def folder() -> Path | None:
    """Return where trials are kept, None where there is no cache."""
    parent = default_folder()
    return None if parent is None else parent / "trials"


def clear() -> int:
    """Delete all cached trials; return the bytes freed. Raises EdgeclipError."""
    freed = 0
    _memory.clear()
    parent = folder()
    for file in [] if parent is None else parent.glob("*.json"):
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
    several precisions are timed ones. Raises DeviceError where none is right.
    """
    right = [name for name, trial in found.items() if not trial.problem]
    if not right:
        reasons = "; ".join(f"{name}: {trial.problem}" for name, trial in found.items())
        raise DeviceError(f"no precision gives its golden outputs ({reasons})")
    times = {name: found[name].ms or 0.0 for name in right}
    fastest = min(right, key=times.__getitem__)
    if plainest in times and times[fastest] >= margin * times[plainest]:
        return plainest
    return fastest
