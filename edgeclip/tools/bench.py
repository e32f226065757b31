"""How fast a bundle is on this machine: its stages, whole answers, batches, labels, start and memory.

Each device and precision is measured in a process of its own, so that start and memory are its own.
Wall clock throughout: what is timed ends when the result is there for the caller, on a GPU too.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip import __version__, _core, host
from edgeclip.backends import select
from edgeclip.backends.select import ORDER, engine_precisions, why_not
from edgeclip.bundle import Bundle
from edgeclip.errors import EdgeclipError
from edgeclip.images.decoding import decode
from edgeclip.labels import Label, LabelSet
from edgeclip.progress import text_progress
from edgeclip.purify import CosPurifier, DiffPurifier
from edgeclip.runtime import Runtime
from edgeclip.tools import golden
from edgeclip.tools.doctor import PACKAGES, installed

T = TypeVar("T")

FRAME = 640, 480  # width, height: of a camera, where no image is given
CLASSES = 1000  # where no labels are given; their embeddings are random, which changes no time
GPU_RUNS = 50  # of which the GPU's own clock gives the median
TEXTS = 16  # labels encoded at a time
WARM_UP = 2
MIN_RUNS = 5
PROGRESS_DELAY = 1  # seconds: what is done sooner needs no bar
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long."""

    image: bytes  # of a file
    labels: tuple[Label, ...] = ()
    purify: str = "auto"
    batch_sizes: tuple[int, ...] = (1, 8)
    seconds: float = 1.0  # for each of the calls that are timed
    repeats: int | None = None  # of each, in place of seconds
    threads: int | None = None


def run(
    bundle: Bundle, settings: Settings, device: str = "auto", precisions: Sequence[str] = ()
) -> dict[str, Any]:
    """The report. device: auto for all that are there; precisions: none for all of the bundle's.

    What cannot be measured is in "failed", with its error. Raises ImageError where the image cannot
    be read, DeviceError where there is no device.
    """
    frame = decode(settings.image)
    # With CUDA in a process of its own, or this one would keep memory of the GPU until the end.
    wanted = str(bundle.path), device, tuple(precisions)
    pairs = _apart(places, *wanted) if _core.cuda_built() else places(*wanted)
    report: dict[str, Any] = {
        "bundle": str(bundle.path),
        "description": bundle.manifest.description,
        "machine": host.describe(),
        "versions": {"edgeclip": f"{__version__}, core {_core.simd()}"}
        | {name: v for name in PACKAGES if (v := installed(name)) != "not installed"},
        "image": f"{frame.shape[1]}x{frame.shape[0]}, a file of {len(settings.image)} bytes",
        "labels": len(settings.labels) or CLASSES,
        "warnings": host.busy(),
        "measured": [],
        "failed": [],
    }
    for name, precision in pairs:
        place = {"device": name, "precision": precision}
        try:
            which = str(bundle.path), name, precision
            problem = _apart(check, *which, settings.threads)
            found = _apart(measure, *which, settings)
        except EdgeclipError as err:
            report["failed"].append(place | {"error": str(err)})
        else:
            report["measured"].append(place | {"problem": problem} | found)
    report["warnings"] += host.hot()  # now, after the work
    return report


def places(path: str, device: str, precisions: Sequence[str]) -> list[tuple[str, str]]:
    """The devices and precisions to measure, the best first."""
    bundle, found = Bundle(path), []
    for name in [d for d in ORDER if not why_not(bundle, d)] if device == "auto" else [device]:
        built = engine_precisions(bundle) if name == "tensorrt" and not precisions else None
        found += [(name, p) for p in precisions or built or bundle.manifest.precisions]
    return found


def picture(width: int, height: int) -> Image.Image:
    """A picture with the detail of a photograph: smooth shapes and some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-8, 9, smooth.shape, np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def read_image(path: str | None) -> bytes:
    """A file's bytes; None for a JPEG made here. Raises ImageError."""
    if path is None:
        buffer = io.BytesIO()
        picture(*FRAME).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    decode(path)  # raises what is wrong with it, with its name
    return Path(path).read_bytes()


def _apart(call: Callable[..., T], *arguments: Any) -> T:
    """What it returns in a fresh process. Raises EdgeclipError."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, initializer=_quiet) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool as err:
            raise EdgeclipError("the process that measured it died; is memory short?") from err


def _quiet() -> None:
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is the system's, and stays behind an interruption
    logging.getLogger(select.__name__).setLevel(logging.ERROR)  # the report has these problems
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback


def check(bundle: str, device: str, precision: str, threads: int | None) -> str:
    """Return why a precision is not right here, or "". It is tried, too, which slows a first start."""
    runtime = Runtime(bundle, device=device, precision=precision, purify="none", threads=threads)
    try:
        golden.check(runtime)
    except EdgeclipError as err:
        return str(err)
    return ""


def measure(bundle: str, device: str, precision: str, settings: Settings) -> dict[str, Any]:
    """One device and precision. Raises EdgeclipError."""
    gpu_before = None if device == "cpu" else host.gpu_memory_mb()
    start = time.perf_counter()
    rt = Runtime(
        bundle,
        device=device,
        precision=precision,
        purify=settings.purify,
        batch_size=max(settings.batch_sizes),
        threads=settings.threads,
    )
    opened = time.perf_counter() - start
    labels = _label_set(rt, settings.labels)
    start = time.perf_counter()
    rt.classify(settings.image, labels)
    first = time.perf_counter() - start
    memory: dict[str, float | None] = {"resident": host.memory_mb().get("resident")}

    calls = _calls(rt, settings, labels)
    texts = _prompts(rt)
    calls["labels"] = lambda: rt.embed_texts(texts)
    found = {}
    for name, call in _watched(calls, f"{device} {precision}"):
        found[name] = percentiles(times_ms(call, settings.seconds, settings.repeats))
    encoding = found.pop("labels")
    memory["peak"] = host.memory_mb().get("peak")
    if gpu_before is not None and (gpu_after := host.gpu_memory_mb()) is not None:
        memory["gpu"] = gpu_after - gpu_before
    batches = [
        {
            "size": size,
            "prepared per second": 1e3 * size / found.pop(f"prepared {size}")["p50"],
            "frames per second": 1e3 * size / found.pop(f"frames {size}")["p50"],
        }
        for size in settings.batch_sizes
    ]
    on_gpu = {} if rt.gpu is None else _gpu_stages(rt, settings, labels)
    return {
        "purification": str(rt.purifier or "none"),
        "opened ms": 1e3 * opened,
        "first answer ms": 1e3 * first,
        "stages ms": found,
        "stages on the GPU ms": on_gpu,
        "batches": batches,
        "labels per second": 1e3 * TEXTS / encoding["p50"],
        "prompts per label": len(rt.bundle.manifest.templates),
        "memory MB": memory,
    }


def _label_set(rt: Runtime, labels: Sequence[Label]) -> LabelSet:
    if labels:
        return rt.labels(labels, progress=text_progress())
    return LabelSet.random(CLASSES, rt.bundle.null_text, rt.text_identity())


def _prompts(rt: Runtime) -> list[str]:
    """Of labels that are encoded anew each time: `embed_texts` caches nothing."""
    labels = [Label(f"a thing of kind {i}") for i in range(TEXTS)]
    return [text for label in labels for text in label.worded(rt.bundle.manifest.templates)]


def _calls(rt: Runtime, settings: Settings, labels: LabelSet) -> dict[str, Callable[[], object]]:
    """What is timed, by its name."""
    image, spec = settings.image, rt.bundle.manifest.image
    frame = decode(image)
    pixels = rt.preprocess([frame])
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(image, fast_for=spec),
        "preprocess": lambda: rt.preprocess([frame]),
        "image encoder": lambda: rt.encode(pixels),
        "classify": _classify(rt, rt.encode(pixels), labels),
        "encoder and classify": lambda: rt.classify_pixels(pixels, labels),
        "frame to answer": lambda: rt.classify(frame, labels),
        "file to answer": lambda: rt.classify(image, labels),
    }
    # On a GPU it is part of what follows the encoder there, and with a prior most of it is the
    # prior: neither can be called alone.
    if rt.device != "cpu" or isinstance(rt.purifier, DiffPurifier):
        del calls["classify"]
    for size in settings.batch_sizes:
        many, frames = np.repeat(pixels, size, axis=0), [frame] * size
        calls[f"prepared {size}"] = partial(rt.classify_pixels, many, labels)
        calls[f"frames {size}"] = partial(rt.classify, frames, labels)
    return calls


def _gpu_stages(rt: Runtime, settings: Settings, labels: LabelSet) -> dict[str, float]:
    """The medians of one frame, by the GPU's own clock."""
    if rt.gpu is None or isinstance(rt.purifier, DiffPurifier):
        return {}
    frames, purifier = [decode(settings.image)], rt.purifier
    runs = [rt.gpu.stage_ms(frames, labels, purifier) for _ in range(settings.repeats or GPU_RUNS)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _classify(
    rt: Runtime, embedding: NDArray[np.float32], labels: LabelSet
) -> Callable[[], object]:
    """What a Runtime on a CPU does with an embedding (1, D): purification, scores, top-k."""
    cos = rt.purifier if isinstance(rt.purifier, CosPurifier) else None
    purification: dict[str, Any] = {}
    if cos is not None:
        purification = {"null_text": rt.bundle.null_text, "null_scores": labels.null_scores}
        purification |= {"steps": cos.steps, "step_size": cos.step_size}
    scale, top_k = rt.bundle.manifest.logit_scale, min(5, len(labels))
    return lambda: _core.classify(
        embedding, labels.embeddings, logit_scale=scale, top_k=top_k, **purification
    )


def times_ms(call: Callable[[], object], seconds: float, repeats: int | None) -> list[float]:
    """Milliseconds of each call: as many as fit into `seconds`, at least MIN_RUNS, or `repeats`."""
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    begin = last = time.perf_counter()
    while len(times) < (repeats or MIN_RUNS) or (repeats is None and last - begin < seconds):
        before = time.perf_counter()
        call()
        last = time.perf_counter()
        times.append(1e3 * (last - before))
    return times


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Of milliseconds, and how many there are."""
    found = np.percentile(times, PERCENTILES).tolist()
    return {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)} | {
        "runs": len(times)
    }


def _watched(
    calls: dict[str, Callable[[], object]], what: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls, with a bar on stderr where a person watches."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return iter(
        tqdm(calls.items(), what, unit="call", delay=PROGRESS_DELAY, leave=False, disable=quiet)
    )


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['bundle']}: {report['description']}",
        *(f"{key}: {value}" for key, value in report["machine"].items()),
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        f"image {report['image']}; {report['labels']} labels; milliseconds",
        *(f"warning: {text}" for text in report["warnings"]),
    ]
    for found in report["measured"]:
        lines += ["", *_render_one(found)]
    return "\n".join(lines)


def _render_one(found: dict[str, Any]) -> list[str]:
    place = f"{found['device']} {found['precision']}, purification {found['purification']}"
    heads = [f"p{p}" for p in PERCENTILES]
    lines = [f"{place:<34}" + "".join(f"{head:>10}" for head in heads) + f"{'runs':>8}"]
    if found["problem"]:
        lines.append(f"  warning: {found['problem']}")
    for name, ms in found["stages ms"].items():
        cells = "".join(f"{ms[head]:>10.3f}" for head in heads)
        lines.append(f"  {name:<32}{cells}{ms['runs']:>8}")
    if own := found["stages on the GPU ms"]:
        each = ", ".join(f"{name} {ms:.3f}" for name, ms in own.items())
        lines.append(f"  by the GPU's own clock, without a graph: {each}")
    for row in found["batches"]:
        lines.append(
            f"  batch {row['size']}: {row['frames per second']:.1f} frames/s, "
            f"{row['prepared per second']:.1f} images/s once prepared"
        )
    lines.append(
        f"  {found['labels per second']:.1f} labels/s encoded, "
        f"of {found['prompts per label']} prompts each"
    )
    lines.append(
        f"  opened in {found['opened ms']:.0f} ms, first answer {found['first answer ms']:.0f} ms after"
    )
    told = [f"{name} {mb:.0f}" for name, mb in found["memory MB"].items() if mb is not None]
    return [*lines, f"  memory in MB: {', '.join(told) or 'not known'}"]
