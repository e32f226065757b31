"""Selection of the device and precision of a bundle's image encoder."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeclip import _core
from edgeclip.backends.base import Encoder
from edgeclip.backends.onnx_runtime import OnnxEncoder, available_devices
from edgeclip.backends.trials import best, trials
from edgeclip.bundle import Bundle
from edgeclip.errors import DeviceError
from edgeclip.manifest import Manifest
from edgeclip.precisions import REFERENCE, by_preference

if TYPE_CHECKING:
    from edgeclip.backends.cuda_pipeline import GpuPipeline
    from edgeclip.backends.engine_cache import EngineKey

logger = logging.getLogger(__name__)

ORDER = ("tensorrt", "cuda", "cpu")  # best first
DEVICES = ("auto", *reversed(ORDER))
MARGIN = 0.7  # a less exact precision is chosen only below this fraction of fp32's time
MAX_GPU_BATCH = 64  # capacity of the pixel buffer on the GPU, in images


@dataclass(frozen=True)
class ImageSide:
    """The image half of a Runtime."""

    encoder: Encoder
    device: str
    precision: str
    gpu: GpuPipeline | None  # None: preprocessing and classification run on the CPU
    text_precision: str

    @property
    def onnx_device(self) -> str:
        """Device of the graphs that ONNX Runtime runs: text encoder and prior."""
        return "cpu" if self.device == "tensorrt" else self.device


def open_image_side(
    bundle: Bundle, device: str, precision: str, *, batch_size: int, threads: int
) -> ImageSide:
    """Open the image encoder on `device`.

    auto: the first that works of a built TensorRT engine, CUDA by ONNX Runtime, and the CPU. Failed
    candidates are logged. Raises DeviceError if the device is not available, BundleError, and
    ValueError for an unknown name.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be {', '.join(DEVICES)}, got {device!r}")
    if device != "auto":
        return _open(bundle, device, precision, batch_size, threads)
    candidates = available_devices()
    if stored_engines(bundle):
        candidates.insert(0, "tensorrt")
    for candidate, following in itertools.pairwise(candidates):
        try:
            return _open(bundle, candidate, precision, batch_size, threads)
        except DeviceError as err:
            logger.warning("%s; using %s", err, following)
    return _open(bundle, candidates[-1], precision, batch_size, threads)


def _open(bundle: Bundle, device: str, precision: str, batch_size: int, threads: int) -> ImageSide:
    manifest = bundle.manifest
    check_known(bundle, precision)
    if device == "tensorrt":
        return _open_tensorrt(bundle, precision, threads)
    has_pipeline = device == "cuda" and _core.cuda_built()
    if has_pipeline:
        check_cuda(device)
    chosen = choose_precision(bundle, precision, device, threads)
    path = bundle.encoder("image_encoder", chosen)
    if has_pipeline:
        from edgeclip.backends.onnx_cuda import OnnxGpuEncoder

        gpu_encoder = OnnxGpuEncoder(
            path,
            shape=input_shape(manifest),
            embed_dim=manifest.embed_dim,
            max_batch=min(batch_size, MAX_GPU_BATCH),
            threads=threads,
        )
        return ImageSide(gpu_encoder, device, chosen, _pipeline(bundle, gpu_encoder), chosen)
    encoder = OnnxEncoder(path, device=device, threads=threads)
    encoder.check_shapes(input_shape(manifest), manifest.embed_dim)
    if device == "cuda":  # a wheel without code for this GPU fails only when it runs
        encoder.embed(np.zeros((1, *input_shape(manifest)), np.float32))
    return ImageSide(encoder, device, chosen, None, chosen)


def _open_tensorrt(bundle: Bundle, precision: str, threads: int) -> ImageSide:
    from edgeclip.backends.engine_cache import EngineCache
    from edgeclip.backends.tensorrt_encoder import TensorRTEncoder
    from edgeclip.backends.tensorrt_module import import_tensorrt

    check_cuda("tensorrt")
    trt, cache = import_tensorrt(), EngineCache()
    names = bundle.manifest.precisions
    order = [row.name for row in by_preference("tensorrt") if row.name in names]
    for name in order if precision == "auto" else [precision]:
        path = cache.latest(image_engine_key(bundle, name, trt))
        if path is not None:  # checked against the golden values when it was built
            encoder = TensorRTEncoder(path.read_bytes(), path.name)
            encoder.check_shapes(input_shape(bundle.manifest), bundle.manifest.embed_dim)
            text_precision = choose_precision(bundle, precision, "cpu", threads)
            pipeline = _pipeline(bundle, encoder)
            return ImageSide(encoder, "tensorrt", name, pipeline, text_precision)
    option = "" if precision == "auto" else f" --precision {precision}"
    raise DeviceError(
        f"no TensorRT engine of {bundle.path} was built for this GPU with {trt.__name__} "
        f"{trt.__version__}: run edgeclip build {bundle.path}{option}"
    )


def _pipeline(bundle: Bundle, encoder: Any) -> GpuPipeline:
    """Create and warm up the pipeline. Raises DeviceError if a stage does not run here."""
    from edgeclip.backends.cuda_pipeline import GpuPipeline

    pipeline = GpuPipeline(encoder, bundle.manifest, bundle.null_text)
    pipeline.warm_up()
    return pipeline


def input_shape(manifest: Manifest) -> tuple[int, ...]:
    """Return the shape of one image, (3, H, W)."""
    return (3, *manifest.image.size)


def check_cuda(device: str) -> dict[str, Any]:
    """Return the core's description of the GPU. Raises DeviceError if `device` cannot use it."""
    if not _core.cuda_built():
        raise DeviceError(
            f"device {device!r} needs edgeclip's CUDA kernels, which this build lacks: install it "
            "from source, pip install --config-settings=cmake.define.EDGECLIP_CUDA=ON '.[cpu]'"
        )
    try:
        gpu = _core.cuda_device()
    except RuntimeError as err:  # also in a fork of a process that used the GPU
        raise DeviceError(
            f"device {device!r} needs an NVIDIA GPU and its driver, which do not work here: {err}"
        ) from err
    if gpu["index"] != 0:
        raise DeviceError(
            f"device {device!r} is the first GPU, but this process selected GPU {gpu['index']}: "
            "select it with CUDA_VISIBLE_DEVICES instead"
        )
    return gpu


def image_engine_key(bundle: Bundle, precision: str, trt: Any, options: Any = None) -> EngineKey:
    """Return the engine key of a bundle's image encoder on this GPU. Raises DeviceError."""
    from edgeclip.backends.engine_cache import BuildOptions, Gpu
    from edgeclip.backends.tensorrt_builder import engine_key

    device = check_cuda("tensorrt")
    gpu = Gpu(device["name"], device["capability"])
    return engine_key(graph_hashes(bundle, precision), trt, gpu, options or BuildOptions())


def graph_hashes(bundle: Bundle, precision: str) -> tuple[str, ...]:
    """Return the sha256 of a precision's image encoder: its graph, and its weights if separate."""
    name = bundle.manifest.precisions[precision].image_encoder
    files = bundle.manifest.files
    return tuple(files[n] for n in (name, f"{name}.data") if n in files)


def stored_engines(bundle: Bundle) -> list[Path]:
    """Return the engines of the bundle's image encoders for any GPU, without loading TensorRT."""
    if not _core.cuda_built():
        return []
    from edgeclip.backends.engine_cache import EngineCache

    graphs = [list(graph_hashes(bundle, name)) for name in bundle.manifest.precisions]
    return [entry.path for entry in EngineCache().entries() if entry.key.get("graphs") in graphs]


def engine_precisions(bundle: Bundle) -> list[str]:
    """Return the precisions with an engine for this GPU. Raises DeviceError without TensorRT or a GPU."""
    from edgeclip.backends.engine_cache import EngineCache
    from edgeclip.backends.tensorrt_module import import_tensorrt

    trt, cache = import_tensorrt(), EngineCache()
    names = bundle.manifest.precisions
    return [n for n in names if cache.latest(image_engine_key(bundle, n, trt)) is not None]


def why_not(bundle: Bundle, device: str) -> str:
    """Return why `device` cannot run a bundle here, or "" if nothing is known against it."""
    try:
        if device == "tensorrt":
            from edgeclip.backends.tensorrt_module import import_tensorrt

            check_cuda(device)
            import_tensorrt()
            if not stored_engines(bundle):
                return f"no engine was built: run edgeclip build {bundle.path}"
        elif device not in available_devices():
            return (
                "ONNX Runtime has no CUDA provider: pip uninstall onnxruntime, then "
                "pip install 'edgeclip[gpu]'"
            )
    except DeviceError as err:
        return str(err)
    return ""


def choose_precision(bundle: Bundle, precision: str, device: str, threads: int) -> str:
    """Return the precision to run in ONNX Runtime on `device`, cpu or cuda.

    auto: the fastest precision that reproduces the golden outputs here, see edgeclip.backends.trials.
    A named precision is returned in any case, with a warning if it misses the golden outputs.
    Raises DeviceError if auto finds no precision that reproduces them.
    """
    if precision != "auto":
        (trial,) = trials(bundle, [precision], device, threads, timed=False).values()
        if trial.problem:
            logger.warning(
                "%s: %s misses the golden outputs on this %s (%s): use precision auto",
                bundle.path,
                precision,
                device,
                trial.problem,
            )
        return precision
    candidates = preferred(bundle, device)
    results = trials(bundle, candidates, device, threads, timed=len(candidates) > 1)
    try:
        return best(results, REFERENCE, MARGIN)
    except DeviceError as err:
        if any(trial.error for trial in results.values()):
            raise
        raise DeviceError(
            f"{bundle.path} cannot be used on {device}: {err}; name a precision to use it anyway"
        ) from err


def preferred(bundle: Bundle, device: str) -> list[str]:
    """Return the precisions that `auto` considers on a device, in order of preference.

    A converted precision needs a measurement of its answers (export --data); fp32 needs none.
    """
    variants = bundle.manifest.precisions
    verified = [n for n, v in variants.items() if n == REFERENCE or "top1_agreement" in v.parity]
    rows = [row for row in by_preference(device) if row.name in (verified or variants)]
    # A bundle may have only precisions that are meant for other devices.
    intended = [row for row in rows if device in row.auto_devices]
    return [row.name for row in intended or rows]


def check_known(bundle: Bundle, precision: str) -> None:
    """Raise DeviceError where the bundle has no such precision; auto is always known."""
    variants = bundle.manifest.precisions
    if precision != "auto" and precision not in variants:
        raise DeviceError(
            f"{bundle.path} has no {precision} encoders; it has {', '.join(variants)}"
        )
