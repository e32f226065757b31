"""Conversion of a bundle's fp32 encoders to another precision.

fp16: both encoders. int8: both encoders; a transformer's activation ranges are dynamic, because no set
of images represents all images, and a convolutional tower's are static, from images of a data set,
because ONNX Runtime has no fast convolution of dynamic ranges. The text encoder's are static, from
prompts, so that a prompt's embedding does not depend on the rest of its batch. int8-weights: both
encoders, which compute in float. int8-qdq: the image encoder, with static ranges from images of a data
set; the text encoder stays fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torchvision.models import ResNet18_Weights

from edgeclip import _core
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import GOLDEN
from edgeclip.manifest import ImageSpec, Manifest, Variant
from edgeclip.precisions import ALL_TOWERS, CONVOLUTIONAL_TOWERS, PRECISIONS
from export import ExportError
from export.golden import GOLDEN_PROMPTS
from export.graphs.fp16 import to_fp16
from export.graphs.int8 import to_int8, to_int8_weights, to_qdq
from export.graphs.product_errors import Inputs
from train.models.checkpoints import Source
from train.progress import brief

if TYPE_CHECKING:
    from train.data.dataset import DataSet

CALIBRATION_WORDS = 250
CALIBRATION_IMAGES, CALIBRATION_BATCH = 128, 16

Files = tuple[Path, Path]  # source and target


class Calibration(NamedTuple):
    """Inputs that converters measure errors and activation ranges on."""

    golden: NDArray[np.float32]  # pixels (1, 3, H, W)
    prompts: Sequence[Inputs]
    images: Sequence[Inputs]


def convert_encoders(
    folder: Path,
    fp32: Variant,
    variant: Variant,
    precision: str,
    manifest: Manifest,
    source: Source,
    images: Sequence[Inputs] = (),
) -> None:
    """Write the encoders of `variant` from those of `fp32`, all in `folder`.

    images: calibration images, if the precision needs any, see `calibration_images`. Raises
    ExportError.
    """
    image = folder / fp32.image_encoder, folder / variant.image_encoder
    text = folder / fp32.text_encoder, folder / variant.text_encoder
    try:
        with np.load(folder / GOLDEN, allow_pickle=False) as golden:
            pixels = golden["pixels"][None]
        calibration = Calibration(pixels, calibration_prompts(source, manifest), images)
        CONVERTERS[precision](image, text, calibration)
    except Exception as err:  # ONNX Runtime's converters raise anything
        raise ExportError(
            f"cannot make {precision} encoders ({brief(err)}): export without {precision}"
        ) from err


def _convert_fp16(image: Files, text: Files, calibration: Calibration) -> None:
    to_fp16(*image)
    to_fp16(*text)


def _convert_int8(image: Files, text: Files, calibration: Calibration) -> None:
    if calibration.images:
        to_int8(*image, calibration.images, static=True)
    else:
        to_int8(*image, [{"pixels": calibration.golden}], static=False)
    to_int8(*text, calibration.prompts, static=True)
    if _worst_cosine(text, calibration.prompts) < PRECISIONS["int8"].min_cosine:
        to_int8_weights(*text)  # a sentence encoder's activations are too uneven for int8


def _worst_cosine(files: Files, examples: Sequence[Inputs]) -> float:
    """Return the smallest cosine between the embeddings of a converted text encoder and its source."""
    source, target = (OnnxEncoder(path, device="cpu") for path in files)
    cosines = []
    for example in examples:
        a, b = (encoder.embed(example["ids"]).astype(np.float64) for encoder in (source, target))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append(((a * b).sum(axis=1) / norms).min())
    return float(min(cosines))


def _convert_int8_qdq(image: Files, text: Files, calibration: Calibration) -> None:
    to_qdq(*image, calibration.images)  # its text encoder is the fp32 one


def _convert_int8_weights(image: Files, text: Files, calibration: Calibration) -> None:
    to_int8_weights(*image)
    to_int8_weights(*text)


# One converter for each precision of edgeclip.precisions except the reference.
CONVERTERS: dict[str, Callable[[Files, Files, Calibration], None]] = {
    "fp16": _convert_fp16,
    "int8": _convert_int8,
    "int8-weights": _convert_int8_weights,
    "int8-qdq": _convert_int8_qdq,
}


def needs_images(precision: str, source: Source) -> bool:
    """Return whether the activation ranges of the image tower come from images of a data set.

    The one convolution of a transformer, its patch embedding, needs none.
    """
    towers = PRECISIONS[precision].images
    layers = source.model.visual.modules()
    convolutional = sum(isinstance(layer, nn.Conv2d) for layer in layers) > 1
    return towers == ALL_TOWERS or (towers == CONVOLUTIONAL_TOWERS and convolutional)


def calibration_prompts(source: Source, manifest: Manifest) -> list[Inputs]:
    """Return batches of prompts: the templates with names of ImageNet's classes."""
    words = ResNet18_Weights.IMAGENET1K_V1.meta["categories"][:: 1000 // CALIBRATION_WORDS]
    templates = itertools.cycle(manifest.templates)
    texts = [template.replace("{}", word) for template, word in zip(templates, words, strict=False)]
    ids = source.tokenizer([*texts, *GOLDEN_PROMPTS, ""]).numpy()
    if not manifest.text.dynamic_length:
        return [{"ids": batch} for batch in np.array_split(ids, 4)]
    lengths = (ids != manifest.text.pad_id).sum(axis=1)
    return [{"ids": ids[lengths == length, :length]} for length in np.unique(lengths)]


def calibration_images(data: DataSet, spec: ImageSpec) -> list[Inputs]:
    """Return batches of preprocessed images, each spread evenly over a data set, sorted or not."""
    count = min(CALIBRATION_IMAGES, len(data))
    pixels = np.empty((count, 3, *spec.size), np.float32)
    options = {name: value for name, value in vars(spec).items() if name != "size"}
    for i, out in enumerate(pixels):
        # The middles of equal parts: a large set's answers are compared on other images.
        _core.preprocess(data[(2 * i + 1) * len(data) // (2 * count)][0], out, **options)
    batches = -(-count // CALIBRATION_BATCH)
    return [{"pixels": pixels[i::batches]} for i in range(batches)]
