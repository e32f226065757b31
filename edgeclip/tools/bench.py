"""Speed of a bundle on this machine: stages, answers, batches, labels, start and memory.

Each device and precision is measured in a process of its own, so that start and memory are not
shared. Times are wall clock: a call ends when the caller has the result, on a GPU too.
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
from edgeclip.tools.pictures import picture

T = TypeVar("T")

FRAME = 640, 480  # default width and height, those of a camera
CLASSES = 1000  # default number of labels; random embeddings take the same time
GPU_RUNS = 50  # runs timed by the GPU's clock
TEXTS = 16  # labels encoded at a time
WARM_UP = 2
MIN_RUNS = 5
PROGRESS_DELAY = 1  # seconds before a progress bar appears
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Settings:
    """Inputs of a measurement, and its length."""

    image: bytes  # an encoded file
    labels: tuple[Label, ...] = ()
    purify: str = "auto"
    batch_sizes: tuple[int, ...] = (1, 8)
    seconds: float = 1.0  # for each timed call
    repeats: int | None = None  # number of runs of each timed call, instead of seconds
    threads: int | None = None


def run(
    bundle: Bundle, settings: Settings, device: str = "auto", precisions: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure a bundle and return the report.

    device: auto for every available device. precisions: empty for all that the bundle has. Failures
    are listed under "failed" with their errors. Raises ImageError for an unreadable image and
    DeviceError if no device is available.
    """
    frame = decode(settings.image)
    # In another process with CUDA: this process would hold GPU memory until the end.
    request = bundle.path, device, tuple(precisions)
    targets = (
        _in_new_process(find_targets, *request) if _core.cuda_built() else find_targets(*request)
    )
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
    for name, precision in targets:
        target = {"device": name, "precision": precision}
        arguments = bundle.path, name, precision
        try:
            problem = _in_new_process(check, *arguments, settings.threads)
            figures = _in_new_process(measure, *arguments, settings)
        except EdgeclipError as err:
            report["failed"].append(target | {"error": str(err)})
        else:
            report["measured"].append(target | {"problem": problem} | figures)
    report["warnings"] += host.hot()  # after the work, which heats
    return report


def find_targets(path: Path, device: str, precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of device and precision to measure, the preferred device first."""
    bundle, targets = Bundle(path), []
    for name in [d for d in ORDER if not why_not(bundle, d)] if device == "auto" else [device]:
        built = engine_precisions(bundle) if name == "tensorrt" and not precisions else None
        targets += [(name, p) for p in precisions or built or bundle.manifest.precisions]
    return targets


def read_image(path: str | None) -> bytes:
    """Return the bytes of a file, or of a drawn JPEG for None. Raises ImageError."""
    if path is None:
        buffer = io.BytesIO()
        picture(*FRAME).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    decode(path)  # its error names the file
    return Path(path).read_bytes()


def _in_new_process(call: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process and return its result. Raises EdgeclipError."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare_process) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except BrokenProcessPool as err:
            raise EdgeclipError("the measuring process died; is memory short?") from err


def _prepare_process() -> None:
    """Silence warnings that each process would repeat, and end on Ctrl-C without a traceback."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is the system's, and stays behind an interruption
    logging.getLogger(select.__name__).setLevel(logging.ERROR)  # the report has these problems
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback


def check(bundle: Path, device: str, precision: str, threads: int | None) -> str:
    """Return the error of the golden check, or "".

    Opening the runtime also runs the trials of precisions, which would slow a measured start.
    """
    runtime = Runtime(bundle, device=device, precision=precision, purify="none", threads=threads)
    try:
        golden.check(runtime)
    except EdgeclipError as err:
        return str(err)
    return ""


def measure(bundle: Path, device: str, precision: str, settings: Settings) -> dict[str, Any]:
    """Measure one device and precision. Raises EdgeclipError."""
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
    stages = {}
    for name, call in _with_progress(calls, f"{device} {precision}"):
        stages[name] = percentiles(times_ms(call, settings.seconds, settings.repeats))
    encoding = stages.pop("labels")
    memory["peak"] = host.memory_mb().get("peak")
    if gpu_before is not None and (gpu_after := host.gpu_memory_mb()) is not None:
        memory["gpu"] = gpu_after - gpu_before
    batches = [
        {
            "size": size,
            "prepared_per_second": 1e3 * size / stages.pop(f"prepared {size}")["p50"],
            "frames_per_second": 1e3 * size / stages.pop(f"frames {size}")["p50"],
        }
        for size in settings.batch_sizes
    ]
    on_gpu = {} if rt.gpu is None else _gpu_stages(rt, settings, labels)
    return {
        "purification": str(rt.purifier or "none"),
        "opened_ms": 1e3 * opened,
        "first_answer_ms": 1e3 * first,
        "stages_ms": stages,
        "gpu_stages_ms": on_gpu,
        "batches": batches,
        "labels_per_second": 1e3 * TEXTS / encoding["p50"],
        "prompts_per_label": len(rt.bundle.manifest.templates),
        "memory_mb": memory,
    }


def _label_set(rt: Runtime, labels: Sequence[Label]) -> LabelSet:
    """Return the encoded labels, or random ones if there are none."""
    if labels:
        return rt.labels(labels, progress=text_progress())
    return LabelSet.random(CLASSES, rt.bundle.null_text, rt.text_identity())


def _prompts(rt: Runtime) -> list[str]:
    """Return prompts to encode with `embed_texts`, which caches nothing."""
    labels = [Label(f"a thing of kind {i}") for i in range(TEXTS)]
    return [text for label in labels for text in label.worded(rt.bundle.manifest.templates)]


def _calls(rt: Runtime, settings: Settings, labels: LabelSet) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name."""
    image, spec = settings.image, rt.bundle.manifest.image
    frame = decode(image)
    pixels = rt.preprocess([frame])
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: decode(image, fast_for=spec),
        "preprocess": lambda: rt.preprocess([frame]),
        "image_encoder": lambda: rt.encode(pixels),
        "classify": _classify(rt, rt.encode(pixels), labels),
        "encoder_and_classify": lambda: rt.classify_pixels(pixels, labels),
        "frame_to_answer": lambda: rt.classify(frame, labels),
        "file_to_answer": lambda: rt.classify(image, labels),
    }
    # On a GPU, and with a prior, classify cannot be called alone.
    if rt.device != "cpu" or isinstance(rt.purifier, DiffPurifier):
        del calls["classify"]
    for size in settings.batch_sizes:
        many, frames = np.repeat(pixels, size, axis=0), [frame] * size
        calls[f"prepared {size}"] = partial(rt.classify_pixels, many, labels)
        calls[f"frames {size}"] = partial(rt.classify, frames, labels)
    return calls


def _gpu_stages(rt: Runtime, settings: Settings, labels: LabelSet) -> dict[str, float]:
    """Return the median of each stage of one frame, in ms by the GPU's clock."""
    if rt.gpu is None or isinstance(rt.purifier, DiffPurifier):
        return {}
    frames, purifier = [decode(settings.image)], rt.purifier
    runs = [rt.gpu.stage_ms(frames, labels, purifier) for _ in range(settings.repeats or GPU_RUNS)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _classify(
    rt: Runtime, embedding: NDArray[np.float32], labels: LabelSet
) -> Callable[[], object]:
    """Return a call that purifies an embedding (1, D) and ranks labels as a Runtime on a CPU does."""
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
    """Return the milliseconds of each call.

    The number of calls is `repeats`, or as many as fit into `seconds`, but at least MIN_RUNS.
    """
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
    """Return the percentiles of times, and their number."""
    values = np.percentile(times, PERCENTILES).tolist()
    named = {f"p{p}": value for p, value in zip(PERCENTILES, values, strict=True)}
    return named | {"runs": len(times)}


def _with_progress(
    calls: dict[str, Callable[[], object]], title: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Iterate over the calls, with a progress bar if stderr is a terminal."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return iter(
        tqdm(calls.items(), title, unit="call", delay=PROGRESS_DELAY, leave=False, disable=quiet)
    )


def render(report: dict[str, Any]) -> str:
    """Return the report as a table for people."""
    lines = [
        f"{report['bundle']}: {report['description']}",
        *(f"{key.replace('_', ' ')}: {value}" for key, value in report["machine"].items()),
        ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
        f"image {report['image']}; {report['labels']} labels; milliseconds",
        *(f"warning: {text}" for text in report["warnings"]),
    ]
    for figures in report["measured"]:
        lines += ["", *_render_one(figures)]
    return "\n".join(lines)


def _render_one(figures: dict[str, Any]) -> list[str]:
    title = f"{figures['device']} {figures['precision']}, purification {figures['purification']}"
    heads = [f"p{p}" for p in PERCENTILES]
    lines = [f"{title:<34}" + "".join(f"{head:>10}" for head in heads) + f"{'runs':>8}"]
    if figures["problem"]:
        lines.append(f"  warning: {figures['problem']}")
    for name, ms in figures["stages_ms"].items():
        cells = "".join(f"{ms[head]:>10.3f}" for head in heads)
        lines.append(f"  {name.replace('_', ' '):<32}{cells}{ms['runs']:>8}")
    if gpu_stages := figures["gpu_stages_ms"]:
        times = ", ".join(f"{name} {ms:.3f}" for name, ms in gpu_stages.items())
        lines.append(f"  by the GPU's own clock, without a graph: {times}")
    for row in figures["batches"]:
        lines.append(
            f"  batch {row['size']}: {row['frames_per_second']:.1f} frames/s, "
            f"{row['prepared_per_second']:.1f} images/s after preprocessing"
        )
    lines.append(
        f"  {figures['labels_per_second']:.1f} labels/s encoded, "
        f"{figures['prompts_per_label']} prompts each"
    )
    lines.append(
        f"  opened in {figures['opened_ms']:.0f} ms, first answer {figures['first_answer_ms']:.0f} ms later"
    )
    memory = [f"{name} {mb:.0f}" for name, mb in figures["memory_mb"].items() if mb is not None]
    return [*lines, f"  memory in MB: {', '.join(memory) or 'unknown'}"]
