"""Conversion of a bundle's encoders to other precisions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
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

    images: what int8-qdq takes its ranges from, see `pictures`. Raises ExportError.
    """
    pairs = [
        (work / getattr(fp32, kind), work / getattr(made, kind))
        for kind in ("image_encoder", "text_encoder")
    ]
    try:
        if precision == "int8-qdq":
            to_qdq(*pairs[0], images)
        else:
            _convert(work, pairs, precision, prompts(source, manifest))
    except Exception as err:  # of ONNX Runtime's converters, which raise anything
        raise ExportError(
            f"cannot make {precision} encoders ({brief(err)}): export without {precision}"
        ) from err


def _convert(
    work: Path, pairs: Sequence[tuple[Path, Path]], precision: str, texts: Sequence[Inputs]
) -> None:
    if precision == "fp16":
        for given, target in pairs:
            to_fp16(given, target)
        return
    with np.load(work / GOLDEN, allow_pickle=False) as golden:
        pixels = golden["pixels"][None]
    (image, image8), (text, text8) = pairs
    to_int8(image, image8, [{"pixels": pixels}], static=False)
    to_int8(text, text8, texts, static=True)


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
