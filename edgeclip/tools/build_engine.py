"""TensorRT engine of a bundle's image encoder: built on this device, verified and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.backends.base import EMBEDDING, Encoder, unit
from edgeclip.backends.cuda_pipeline import GpuPipeline
from edgeclip.backends.engine_cache import BuildOptions, EngineCache
from edgeclip.backends.golden_values import GoldenValues, largest_distance
from edgeclip.backends.select import check_known, image_engine_key, preferred
from edgeclip.backends.tensorrt_builder import Progress, build_engine
from edgeclip.backends.tensorrt_encoder import TensorRTEncoder
from edgeclip.backends.tensorrt_module import import_tensorrt
from edgeclip.bundle import Bundle
from edgeclip.errors import DeviceError
from edgeclip.images.decoding import ImageSource
from edgeclip.labels import Labels, LabelSet
from edgeclip.precisions import PRECISIONS, REFERENCE, engine_precisions
from edgeclip.prediction import score_table
from edgeclip.runtime import Runtime
from edgeclip.tools import golden

CROPS = 16  # crops of the golden picture, each in four orientations
MIN_AGREEMENT = 0.98
BATCH = 32  # pictures encoded at a time
CLASSES = 10  # random classes of the check of the pipeline


@dataclass(frozen=True)
class Built:
    """Engine in the cache."""

    path: Path
    precision: str
    is_new: bool
    seconds: float  # build time; 0 for an engine that was in the cache
    checked: dict[str, float]  # result of `check`; empty for an engine that was in the cache


def build(
    bundle: Bundle,
    *,
    precision: str = "auto",
    options: BuildOptions | None = None,
    force: bool = False,
    pictures: Sequence[ImageSource] | None = None,
    labels: Labels | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build an engine, which takes minutes, verify it and store it for `device="tensorrt"`.

    precision: one that TensorRT reads; auto for fp16 if its answers are known to be the model's, else
    fp32. force: build even if the engine exists. pictures, labels: see `check`. progress: see
    `build_engine`. Raises DeviceError if TensorRT or a GPU is missing, or if the engine differs from
    the bundle's encoder; such an engine is not stored.
    """
    if (pictures is None) != (labels is None):
        raise ValueError("pictures and labels go together: give both or none")
    if precision == "auto":
        precision = preferred(bundle, "tensorrt")[0]
    check_known(bundle, precision)
    if not PRECISIONS[precision].tensorrt:
        raise DeviceError(
            f"the {precision} encoders are for ONNX Runtime on {PRECISIONS[precision].hardware}; "
            f"TensorRT takes {', '.join(engine_precisions())}: export with --precision fp16"
        )
    trt, cache = import_tensorrt(), EngineCache()
    options = replace(options or BuildOptions(), outputs=(EMBEDDING,))
    key = image_engine_key(bundle, precision, trt, options)
    stored = None if force else cache.find(key)
    if stored is not None:
        return Built(stored, precision, False, 0.0, {})
    start = time.perf_counter()
    engine = build_engine(
        bundle.encoder("image_encoder", precision),
        trt,
        options,
        timing_cache=cache.timing_cache(key),
        progress=progress,
    )
    seconds = time.perf_counter() - start
    encoder = TensorRTEncoder(engine, f"the {precision} engine")
    encoder.check_shapes((3, *bundle.manifest.image.size), bundle.manifest.embed_dim)
    checked = check(encoder, bundle, precision, pictures, labels)
    checked["scores"] = check_pipeline(encoder, bundle)
    path = cache.save(key, engine, {**checked, "build_seconds": seconds})
    return Built(path, precision, True, seconds, checked)


def check_pipeline(encoder: TensorRTEncoder, bundle: Bundle) -> float:
    """Return how far the probabilities of the GPU pipeline are from those computed on the CPU.

    The CPU preprocesses the frames and applies softmax to the encoder's embeddings. Raises
    DeviceError if a probability differs by more than the golden check allows.
    """
    manifest, image = bundle.manifest, GoldenValues(bundle).image
    reference = Runtime(bundle, device="cpu", purify="none", decode="exact")
    labels = LabelSet.random(CLASSES, bundle.null_text)
    pipeline = GpuPipeline(encoder, manifest, bundle.null_text)
    pipeline.warm_up()
    frames = crops(image)[: pipeline.max_batch]
    logits = (
        manifest.logit_scale
        * unit(encoder.embed(reference.preprocess(frames)))
        @ labels.embeddings.T
    )
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected /= expected.sum(axis=1, keepdims=True)
    largest = 0.0
    for _ in range(3):  # run, captured, from the graph
        scores = score_table(*pipeline.classify(frames, labels, None, CLASSES))
        largest = max(largest, float(np.abs(scores - expected).max()))
    if not largest <= golden.SCORE_TOLERANCE:
        raise DeviceError(
            f"the GPU's probabilities differ from the CPU's by {largest:.3g}, more than "
            f"{golden.SCORE_TOLERANCE:g}; the engine was not stored: see edgeclip doctor"
        )
    return largest


def check(
    encoder: Encoder,
    bundle: Bundle,
    precision: str,
    pictures: Sequence[ImageSource] | None = None,
    labels: Labels | None = None,
) -> dict[str, float]:
    """Return how far an encoder of `precision` is from the bundle's encoder.

    golden is the distance from the golden embedding; largest_distance the distance from the CPU's
    embedding (in fp32 if the bundle has it) of any of `pictures`, both between unit vectors;
    top1_agreement the share of pictures with the same most similar label. pictures: None for crops
    of the golden picture, with the golden prompts as labels. Raises DeviceError if one of these is
    beyond the limit of the precision.
    """
    limit = PRECISIONS[precision].tolerance
    values = GoldenValues(bundle)
    plain = REFERENCE if REFERENCE in bundle.manifest.precisions else precision
    reference = Runtime(bundle, device="cpu", precision=plain, purify="none")
    if pictures is None or labels is None:
        pictures = crops(values.image)
        classes = reference.embed_texts(values.prompts)
    else:
        classes = reference.labels(labels).embeddings
    reference.release_text()
    largest, agreed = 0.0, 0
    for start in range(0, len(pictures), BATCH):
        pixels = reference.preprocess(pictures[start : start + BATCH])
        ours, theirs = unit(encoder.embed(pixels)), reference.encode(pixels)
        largest = max(largest, float(np.linalg.norm(ours - theirs, axis=1).max()))
        agree = (ours @ classes.T).argmax(axis=1) == (theirs @ classes.T).argmax(axis=1)
        agreed += int(agree.sum())
    embedding = unit(encoder.embed(values.pixels[None]))
    checked = {
        "golden": largest_distance(embedding, values.embedding),
        "largest_distance": largest,
        "top1_agreement": agreed / len(pictures),
        "pictures": float(len(pictures)),
    }
    for name in ("golden", "largest_distance"):
        if not checked[name] <= limit:
            raise DeviceError(
                f"the {precision} engine is not the bundle's encoder: {name.replace('_', ' ')} of "
                f"embeddings {checked[name]:.3g}, more than {limit:g}; it was not stored"
                + (f": build it with --precision {REFERENCE}" if precision != REFERENCE else "")
            )
    if not checked["top1_agreement"] >= MIN_AGREEMENT:
        raise DeviceError(
            f"the {precision} engine agrees with the CPU on {checked['top1_agreement']:.1%} of "
            f"{len(pictures)} pictures, less than {MIN_AGREEMENT:.0%}; it was not stored"
            + (f": build it with --precision {REFERENCE}" if precision != REFERENCE else "")
        )
    return checked


def crops(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return crops of a picture, uint8 (H, W, 3), each in four orientations."""
    height, width, _ = image.shape
    pictures = []
    for i in range(CROPS):
        scale = 0.4 + 0.6 * i / (CROPS - 1)
        tall, wide = max(int(scale * height), 1), max(int(scale * width), 1)
        top, left = (height - tall) * (i % 4) // 3, (width - wide) * (i // 4) // 3
        crop = image[top : top + tall, left : left + wide]
        pictures += [crop, crop[::-1], crop[:, ::-1], crop[::-1, ::-1]]
    return pictures


def describe(built: Built) -> dict[str, Any]:
    """Return the report of a build."""
    lines = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in built.checked.items()]
    return {
        "engine": str(built.path),
        "precision": built.precision,
        "size": f"{built.path.stat().st_size / 1e6:.1f} MB",
        "built": f"in {built.seconds:.1f} s" if built.is_new else "before; --force builds again",
        "checked": lines or "when it was built",
    }
