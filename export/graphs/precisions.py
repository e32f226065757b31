"""Conversion of a bundle's encoders to other precisions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torchvision.models import ResNet18_Weights

from edgeclip import _core
from edgeclip.bundle import GOLDEN
from edgeclip.manifest import ImageSpec, Manifest, Variant
from export import ExportError
from export.golden import GOLDEN_PROMPTS
from export.graphs.fp16 import to_fp16
from export.graphs.int8 import PART, PICTURES, WORDS, Inputs, to_int8, to_qdq
from train.models.checkpoints import Source
from train.progress import brief

if TYPE_CHECKING:
    from train.data.dataset import DataSet


Files = tuple[Path, Path]  # source and target


class Calibration(NamedTuple):
    """Inputs that converters measure errors and activation ranges on."""

    golden: NDArray[np.float32]  # pixels (1, 3, H, W)
    prompts: Sequence[Inputs]
    images: Sequence[Inputs]


def convert_encoders(
    work: Path,
    fp32: Variant,
    made: Variant,
    precision: str,
    manifest: Manifest,
    source: Source,
    images: Sequence[Inputs] = (),
) -> None:
    """Write the encoders of `made`, of any precision, from those of `fp32`, all of them in `work`.

    images: inputs for activation ranges of the image encoder, see `pictures`. Raises ExportError.
    """
    image = work / fp32.image_encoder, work / made.image_encoder
    text = work / fp32.text_encoder, work / made.text_encoder
    try:
        with np.load(work / GOLDEN, allow_pickle=False) as golden:
            pixels = golden["pixels"][None]
        calibration = Calibration(pixels, prompts(source, manifest), images)
        CONVERTERS[precision](image, text, calibration)
    except Exception as err:  # of ONNX Runtime's converters, which raise anything
        raise ExportError(
            f"cannot make {precision} encoders ({brief(err)}): export without {precision}"
        ) from err


def _convert_fp16(image: Files, text: Files, calibration: Calibration) -> None:
    to_fp16(*image)
    to_fp16(*text)


def _convert_int8(image: Files, text: Files, calibration: Calibration) -> None:
    to_int8(*image, [{"pixels": calibration.golden}], static=False)
    to_int8(*text, calibration.prompts, static=True)


def _convert_int8_qdq(image: Files, text: Files, calibration: Calibration) -> None:
    to_qdq(*image, calibration.images)  # its text encoder is the fp32 one


# One for each precision of edgeclip.precisions but the reference.
CONVERTERS: dict[str, Callable[[Files, Files, Calibration], None]] = {
    "fp16": _convert_fp16,
    "int8": _convert_int8,
    "int8-qdq": _convert_int8_qdq,
}


def prompts(source: Source, manifest: Manifest) -> list[Inputs]:
    """Batches of prompts that stand for all: the templates with the words of ImageNet."""
    words = ResNet18_Weights.IMAGENET1K_V1.meta["categories"][:: 1000 // WORDS]
    templates = itertools.cycle(manifest.templates)
    texts = [template.replace("{}", word) for template, word in zip(templates, words, strict=False)]
    ids = source.tokenizer([*texts, *GOLDEN_PROMPTS, ""]).numpy()
    if not manifest.text.dynamic_length:
        return [{"ids": part} for part in np.array_split(ids, 4)]
    lengths = (ids != manifest.text.pad_id).sum(axis=1)
    return [{"ids": ids[lengths == length, :length]} for length in np.unique(lengths)]


def pictures(data: DataSet, spec: ImageSpec) -> list[Inputs]:
    """Inputs of an image encoder from all over a data set, whichever it is sorted by."""
    count = min(PICTURES, len(data))
    pixels = np.empty((count, 3, *spec.size), np.float32)
    options = {name: value for name, value in vars(spec).items() if name != "size"}
    for i, out in enumerate(pixels):
        # The middles of equal parts: fidelity compares answers on others, where there are enough.
        _core.preprocess(data[(2 * i + 1) * len(data) // (2 * count)][0], out, **options)
    return [{"pixels": pixels[i : i + PART]} for i in range(0, count, PART)]
