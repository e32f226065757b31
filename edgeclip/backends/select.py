"""On which device, and in which precision, a bundle's image encoder runs."""

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
    from edgeclip.backends.tensorrt_builder import EngineKey

logger = logging.getLogger(__name__)

ORDER = ("tensorrt", "cuda", "cpu")  # the best first
DEVICES = ("auto", *reversed(ORDER))
MARGIN = 0.7  # of fp32's time, which a faster precision has to stay below: it is less exact
MAX_GPU_BATCH = 64  # images whose pixels have memory of their own


@dataclass(frozen=True)
class ImageSide:
    """What a Runtime runs images through."""

    encoder: Encoder
    device: str
    precision: str
    gpu: GpuPipeline | None  # None: the host preprocesses and classifies
    text_precision: str

    @property
    def onnx_device(self) -> str:
        """Where ONNX Runtime runs what TensorRT does not: texts, and a prior."""
        return "cpu" if self.device == "tensorrt" else self.device


def open_image_side(
    bundle: Bundle, device: str, precision: str, *, batch_size: int, threads: int
) -> ImageSide:
    """The image encoder on `device`; auto takes the best that works: a TensorRT engine that was built,
    then CUDA through ONNX Runtime, then the CPU. A better one that fails is said in the log.

    Raises DeviceError where it is not available, BundleError, and ValueError for an unknown name.
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
    on_our_kernels = device == "cuda" and _core.cuda_built()
    if on_our_kernels:
        check_cuda(device)
    chosen = choose_precision(bundle, precision, device, threads)
    path = bundle.encoder("image_encoder", chosen)
    if on_our_kernels:
        from edgeclip.backends.onnx_cuda import OnnxGpuEncoder

        on_gpu = OnnxGpuEncoder(
            path,
            shape=input_shape(manifest),
            embed_dim=manifest.embed_dim,
            max_batch=min(batch_size, MAX_GPU_BATCH),
            threads=threads,
        )
        return ImageSide(on_gpu, device, chosen, _pipeline(bundle, on_gpu), chosen)
    encoder = OnnxEncoder(path, device=device, threads=threads)
    encoder.check_shapes(input_shape(manifest), manifest.embed_dim)
    if device == "cuda":  # a wheel may have no code for this GPU, which shows when it runs
        encoder.embed(np.zeros((1, *input_shape(manifest)), np.float32))
    return ImageSide(encoder, device, chosen, None, chosen)


def _open_tensorrt(bundle: Bundle, precision: str, threads: int) -> ImageSide:
    from edgeclip.backends.tensorrt_builder import EngineCache, import_tensorrt
    from edgeclip.backends.tensorrt_encoder import TensorRTEncoder

    check_cuda("tensorrt")
    trt, cache = import_tensorrt(), EngineCache()
    names = bundle.manifest.precisions
    order = [row.name for row in by_preference("tensorrt") if row.name in names]
    for name in order if precision == "auto" else [precision]:
        path = cache.latest(image_engine_key(bundle, name, trt))
        if path is not None:  # checked against the golden values when it was built here
            encoder = TensorRTEncoder(path.read_bytes(), path.name)
            encoder.check_shapes(input_shape(bundle.manifest), bundle.manifest.embed_dim)
            texts = choose_precision(bundle, precision, "cpu", threads)
            return ImageSide(encoder, "tensorrt", name, _pipeline(bundle, encoder), texts)
    option = "" if precision == "auto" else f" --precision {precision}"
    raise DeviceError(
        f"no TensorRT engine of {bundle.path} was built for this GPU with {trt.__name__} "
        f"{trt.__version__}: edgeclip build {bundle.path}{option}"
    )


def _pipeline(bundle: Bundle, encoder: Any) -> GpuPipeline:
    """Raises DeviceError where anything on its way does not run here."""
    from edgeclip.backends.cuda_pipeline import GpuPipeline

    pipeline = GpuPipeline(encoder, bundle.manifest, bundle.null_text)
    pipeline.warm_up()
    return pipeline


def input_shape(manifest: Manifest) -> tuple[int, ...]:
    """Of one image, (3, H, W)."""
    return (3, *manifest.image.size)


def check_cuda(device: str) -> dict[str, Any]:
    """What the core says of the GPU. Raises DeviceError that says what `device` needs."""
    if not _core.cuda_built():
        raise DeviceError(
            f"device {device!r} needs edgeclip with its CUDA kernels, and this one is without: "
            "from its source, pip install --config-settings=cmake.define.EDGECLIP_CUDA=ON '.[cpu]'"
        )
    try:
        found = _core.cuda_device()
    except RuntimeError as err:  # in a process that was forked from one that used the GPU, too
        raise DeviceError(
            f"device {device!r} needs an NVIDIA GPU and its driver, which do not work here: {err}"
        ) from err
    if found["index"] != 0:
        raise DeviceError(
            f"device {device!r} is the first GPU, and GPU {found['index']} was chosen in this "
            "process: choose one by CUDA_VISIBLE_DEVICES"
        )
    return found


def image_engine_key(bundle: Bundle, precision: str, trt: Any, options: Any = None) -> EngineKey:
    """The key of the engine of a bundle's image encoder on this GPU. Raises DeviceError."""
    from edgeclip.backends.tensorrt_builder import BuildOptions, Gpu, engine_key

    found = check_cuda("tensorrt")
    gpu = Gpu(found["name"], found["capability"])
    return engine_key(graph_hashes(bundle, precision), trt, gpu, options or BuildOptions())


def graph_hashes(bundle: Bundle, precision: str) -> tuple[str, ...]:
    """The sha256 of a precision's image encoder: of the graph, and of its weights beside it."""
    name = bundle.manifest.precisions[precision].image_encoder
    files = bundle.manifest.files
    return tuple(files[n] for n in (name, f"{name}.data") if n in files)


def stored_engines(bundle: Bundle) -> list[Path]:
    """Engines of the bundle's image encoders, for whatever GPU; TensorRT is not even loaded."""
    if not _core.cuda_built():
        return []
    from edgeclip.backends.engine_cache import EngineCache

    graphs = [list(graph_hashes(bundle, name)) for name in bundle.manifest.precisions]
    return [entry.path for entry in EngineCache().entries() if entry.key.get("graphs") in graphs]


def engine_precisions(bundle: Bundle) -> list[str]:
    """Those of which an engine for this GPU is there. Raises DeviceError without TensorRT or a GPU."""
    from edgeclip.backends.tensorrt_builder import EngineCache, import_tensorrt

    trt, cache = import_tensorrt(), EngineCache()
    names = bundle.manifest.precisions
    return [n for n in names if cache.latest(image_engine_key(bundle, n, trt)) is not None]


def why_not(bundle: Bundle, device: str) -> str:
    """Why `device` is not used for a bundle here; empty where there is no reason known beforehand."""
    try:
        if device == "tensorrt":
            from edgeclip.backends.tensorrt_builder import import_tensorrt

            check_cuda(device)
            import_tensorrt()
            if not stored_engines(bundle):
                return f"no engine was built: edgeclip build {bundle.path}"
        elif device not in available_devices():
            return "ONNX Runtime has no CUDA provider: pip uninstall onnxruntime, then " + (
                "pip install 'edgeclip[gpu]'"
            )
    except DeviceError as err:
        return str(err)
    return ""


def choose_precision(bundle: Bundle, precision: str, device: str, threads: int) -> str:
    """Return the precision to run in ONNX Runtime on `device`, cpu or cuda.

    auto: the fastest on this machine of those that give the golden outputs here; see edgeclip.backends.trials.
    One that is named is returned in any case, with a warning where it does not give them.
    Raises DeviceError where the bundle has no such precision, or auto finds none that is right.
    """
    if precision != "auto":
        (trial,) = trials(bundle, [precision], device, threads, timed=False).values()
        if trial.problem:
            logger.warning(
                "%s: %s is not right on this %s (%s): use precision auto",
                bundle.path,
                precision,
                device,
                trial.problem,
            )
        return precision
    candidates = preferred(bundle, device)
    found = trials(bundle, candidates, device, threads, timed=len(candidates) > 1)
    try:
        return best(found, REFERENCE, MARGIN)
    except DeviceError as err:
        if any(trial.error for trial in found.values()):
            raise
        raise DeviceError(
            f"{bundle.path} cannot be used on {device}: {err}; name a precision to use it all the same"
        ) from err


def preferred(bundle: Bundle, device: str) -> list[str]:
    """Return the precisions that `auto` considers on a device, the usually fastest on a GPU first.

    Among them are only those known to give the model's answers (export --data), fp32 always.
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
