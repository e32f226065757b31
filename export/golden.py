"""Golden values of a bundle: one input and its outputs, by open_clip and PyTorch.

golden.npz holds

    image             uint8 (H, W, 3)    synthetic, larger than the model's input, not square
    pixels            float32 (3, h, w)  the image after open_clip's own preprocessing
    embedding         float32 (D,)       its unit embedding
    prompts           str (4,)           prompts of different lengths
    ids               int64 (4, L)       padded to the longest, or to the full context length
    text_embeddings   float32 (4, D)     their unit embeddings
    prior_gradient    float32 (D,)       gradient of the prior's loss, in a bundle with a prior
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
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
def golden_values(directory: Path, source: Source, manifest: Manifest) -> dict[str, Any]:
    """Return the arrays of golden.npz, but for the prior's; `directory` holds the tokenizer.

    Raises ExportError if the tokenizer gives other ids than open_clip's.
    """
    height, width = manifest.image.size
    image = golden_picture(3 * height // 2, 9 * width // 5)
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(source.model))
    pixels = image_transform_v2(settings, is_train=False)(Image.fromarray(image))
    ids, lengths = tokenize(directory, source, manifest, GOLDEN_PROMPTS)
    length = max(lengths) if manifest.text.dynamic_length else manifest.text.context_length
    return {
        "image": image,
        "pixels": pixels.numpy(),
        "embedding": source.model.encode_image(pixels[None], normalize=True)[0].numpy(),
        "prompts": np.array(GOLDEN_PROMPTS),
        "ids": ids.numpy()[:, :length],
        "text_embeddings": source.model.encode_text(ids, normalize=True).numpy(),
    }


def tokenize(
    directory: Path, source: Source, manifest: Manifest, prompts: Sequence[str]
) -> tuple[torch.Tensor, list[int]]:
    """Return open_clip's ids (N, context length) and the length of each row without padding.

    Raises ExportError if the bundle's tokenizer gives other ids.
    """
    text = manifest.text
    expected = source.tokenizer(list(prompts))
    tokenizer = Tokenizer(
        directory / TOKENIZER, context_length=text.context_length, clean=text.clean
    )
    rows = tokenizer(prompts)
    for prompt, ids, expected_ids in zip(prompts, rows, expected.tolist(), strict=True):
        if ids + [text.pad_id] * (text.context_length - len(ids)) != expected_ids:
            raise ExportError(f"{TOKENIZER} gives other ids than open_clip for {prompt[:40]!r}")
    return expected, [len(ids) for ids in rows]
