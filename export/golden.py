"""Golden values of a bundle: one input and its outputs, by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from edgeclip.bundle import TOKENIZER
from edgeclip.manifest import Manifest
from edgeclip.text.tokenizer import Tokenizer
from edgeclip.tools.pictures import golden_picture
from export import ExportError
from train.models.checkpoints import Source

GOLDEN_PROMPTS = (
    "a dog",
    "a photo of a café.",
    "a close-up photo of two small red bicycles",
    "a black and white photo of an old bridge over a river, seen from far away.",
)


@torch.no_grad()
def golden(directory: Path, source: Source, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """What golden.npz holds; the tokenizer has been written to `directory`. Raises ExportError."""
    height, width = manifest.image.size
    image = golden_picture(3 * height // 2, 9 * width // 5)
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(source.model))
    pixels = image_transform_v2(settings, is_train=False)(Image.fromarray(image))
    ids, lengths = tokenize(directory, source, manifest, GOLDEN_PROMPTS)
    used = max(lengths) if manifest.text.dynamic_length else manifest.text.context_length
    return {
        "image": image,
        "pixels": pixels.numpy(),
        "embedding": source.model.encode_image(pixels[None], normalize=True)[0].numpy(),
        "prompts": np.array(GOLDEN_PROMPTS),
        "ids": ids.numpy()[:, :used],
        "text_embeddings": source.model.encode_text(ids, normalize=True).numpy(),
    }


def tokenize(
    directory: Path, source: Source, manifest: Manifest, prompts: Sequence[str]
) -> tuple[torch.Tensor, list[int]]:
    """open_clip's ids (N, context length), and how many of each row are not padding.

    Raises ExportError where the bundle's tokenizer gives others.
    """
    text = manifest.text
    ids = source.tokenizer(list(prompts))
    tokenizer = Tokenizer(
        directory / TOKENIZER, context_length=text.context_length, clean=text.clean
    )
    ours = tokenizer(prompts)
    for prompt, found, row in zip(prompts, ours, ids.tolist(), strict=True):
        if found + [text.pad_id] * (text.context_length - len(found)) != row:
            raise ExportError(f"{TOKENIZER} gives other ids than open_clip for {prompt[:40]!r}")
    return ids, [len(found) for found in ours]
