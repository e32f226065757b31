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
from export import ExportError
from train.models.checkpoints import Source

GOLDEN_PROMPTS = (
    "a dog",
    "a photo of a café.",
    "a close-up photo of two small red bicycles",
    "a black and white photo of an old bridge over a river, seen from far away.",
)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """A picture, uint8 (height, width, 3), with smooth areas, edges, fine lines and some noise."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    rgb = np.stack([0.2 + 0.6 * x, 0.3 + 0.5 * y, 0.7 - 0.4 * x * y], axis=2)
    rgb[np.hypot(x - 0.35, y - 0.4) < 0.22] = (0.85, 0.2, 0.15)
    rgb[(abs(x - 0.7) < 0.15) & (abs(y - 0.65) < 0.2)] = (0.1, 0.35, 0.8)
    rgb += 0.1 * np.sin(60 * np.pi * (x + 0.5 * y))[:, :, np.newaxis] * (y[:, :, np.newaxis] > 0.8)
    rgb += np.random.default_rng(0).normal(0, 0.02, rgb.shape)
    return np.round(255 * rgb.clip(0, 1)).astype(np.uint8)


@torch.no_grad()
def golden(directory: Path, source: Source, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """What golden.npz holds; the tokenizer has been written to `directory`. Raises ExportError."""
    height, width = manifest.image.size
    image = picture(3 * height // 2, 9 * width // 5)
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
