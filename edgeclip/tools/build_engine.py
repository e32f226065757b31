"""The TensorRT engine of a bundle's image encoder: built on this device, held to the bundle, kept."""

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
from edgeclip.backends.golden_values import TOLERANCE, GoldenValues, largest_distance
from edgeclip.backends.select import check_known, image_engine_key, preferred
from edgeclip.backends.tensorrt_builder import (
    BuildOptions,
    EngineCache,
    Progress,
    build_engine,
    import_tensorrt,
)
from edgeclip.backends.tensorrt_encoder import TensorRTEncoder
from edgeclip.bundle import Bundle
from edgeclip.errors import DeviceError
from edgeclip.images.decoding import ImageSource
from edgeclip.labels import Labels, LabelSet
from edgeclip.prediction import score_table
from edgeclip.runtime import Runtime
from edgeclip.tools import golden

CROPS = 16  # of the golden picture, each of them also turned over, upside down and both
MIN_AGREEMENT = 0.98
BATCH = 32  # pictures at a time
CLASSES = 10  # random ones
BUILDABLE = ("fp32", "fp16", "int8-qdq")


@dataclass(frozen=True)
class Built:
    """An engine in the cache."""

    path: Path
    precision: str
    is_new: bool
    seconds: float  # of the build; 0 where it was there
    checked: dict[str, float]  # see `check`; empty where it was there


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
    """Build an engine, which takes minutes, check it and keep it for `device="tensorrt"`.

    precision: fp16, fp32 or int8-qdq; auto for fp16 where its answers are known to be the model's, else fp32.
    force: build although it is there. pictures, labels: what answers are compared on, see `check`.
    progress: see build_engine. Raises DeviceError where TensorRT or a GPU is not here, or where the
    engine is not what the bundle says: then it is not kept.
    """
    if (pictures is None) != (labels is None):
        raise ValueError("pictures and labels go together: answers need both")
    if precision == "auto":
        precision = preferred(bundle, "tensorrt")[0]
    check_known(bundle, precision)
    if precision not in BUILDABLE:
        raise DeviceError(
            f"the {precision} encoders are for ONNX Runtime on CPUs; TensorRT takes "
            f"{', '.join(BUILDABLE)}: export with --precision fp16"
        )
    trt, cache = import_tensorrt(), EngineCache()
    options = replace(options or BuildOptions(), outputs=(EMBEDDING,))
    key = image_engine_key(bundle, precision, trt, options)
    found = None if force else cache.find(key)
    if found is not None:
        return Built(found, precision, False, 0.0, {})
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
    """The largest difference of probabilities between what the GPU does with frames, by graphs too, and
    the softmax of the embeddings that the encoder gives of the CPU's pixels. Raises DeviceError."""
    manifest, image = bundle.manifest, GoldenValues(bundle).image
    reference = Runtime(bundle, device="cpu", purify="none", decode="exact")
    labels = LabelSet.random(CLASSES, bundle.null_text)
    pipeline = GpuPipeline(encoder, manifest, bundle.null_text)
    pipeline.warm_up()
    frames = parts(image)[: pipeline.max_batch]
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
            f"what the GPU computes is not what it should be: probabilities differ by {largest:.3g}, "
            f"more than {golden.SCORE_TOLERANCE:g}; the engine was not kept: see edgeclip doctor"
        )
    return largest


def check(
    encoder: Encoder,
    bundle: Bundle,
    precision: str,
    pictures: Sequence[ImageSource] | None = None,
    labels: Labels | None = None,
) -> dict[str, float]:
    """How far an encoder of `precision` is from the bundle: from the golden embedding (golden), and from
    the plainest encoder on the CPU on each of `pictures` (largest_distance), both of unit vectors;
    and how often the most similar of `labels` is the same one (top1_agreement).

    pictures: None for parts of the golden picture, with the golden prompts for labels.
    Raises DeviceError where any of them is beyond what the precision allows.
    """
    limit = TOLERANCE[precision]
    values = GoldenValues(bundle)
    plain = "fp32" if "fp32" in bundle.manifest.precisions else precision
    reference = Runtime(bundle, device="cpu", precision=plain, purify="none")
    if pictures is None or labels is None:
        pictures = parts(values.image)
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
    found = {
        "golden": largest_distance(embedding, values.embedding),
        "largest_distance": largest,
        "top1_agreement": agreed / len(pictures),
        "pictures": float(len(pictures)),
    }
    for name in ("golden", "largest_distance"):
        if not found[name] <= limit:
            raise DeviceError(
                f"the {precision} engine is not the bundle's encoder: {name.replace('_', ' ')} of "
                f"embeddings {found[name]:.3g}, more than {limit:g}; it was not kept"
                + (": build it with --precision fp32" if precision != "fp32" else "")
            )
    if not found["top1_agreement"] >= MIN_AGREEMENT:
        raise DeviceError(
            f"the {precision} engine gives other answers: {found['top1_agreement']:.1%} of "
            f"{len(pictures)} as on the CPU, less than {MIN_AGREEMENT:.0%}; it was not kept"
            + (": build it with --precision fp32" if precision != "fp32" else "")
        )
    return found


def parts(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Pictures made of one, uint8 (H, W, 3): different parts of it, and these turned over."""
    height, width, _ = image.shape
    found = []
    for i in range(CROPS):
        scale = 0.4 + 0.6 * i / (CROPS - 1)
        tall, wide = max(int(scale * height), 1), max(int(scale * width), 1)
        top, left = (height - tall) * (i % 4) // 3, (width - wide) * (i // 4) // 3
        crop = image[top : top + tall, left : left + wide]
        found += [crop, crop[::-1], crop[:, ::-1], crop[::-1, ::-1]]
    return found


def describe(built: Built) -> dict[str, Any]:
    """For people, and as JSON."""
    lines = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in built.checked.items()]
    return {
        "engine": str(built.path),
        "precision": built.precision,
        "size": f"{built.path.stat().st_size / 1e6:.1f} MB",
        "built": f"in {built.seconds:.1f} s" if built.is_new else "before; --force builds it again",
        "checked": lines or "when it was built",
    }
