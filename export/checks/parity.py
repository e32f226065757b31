"""Parity of exported encoders with PyTorch, on random images, texts and the golden input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgeclip.backends.base import TOKENS, Encoder
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import GOLDEN
from edgeclip.manifest import Manifest
from edgeclip.precisions import PRECISIONS
from export import ExportError
from export.golden import tokenize
from export.graphs.product_errors import Inputs
from train.models.checkpoints import Source
from train.models.towers import image_encoder

CUT_LIMIT = 1e-5  # unit text embeddings: ids cut at their end, compared with ids of full length
BATCHES = (1, 2, 5)

PROBES = (
    "",
    "a dog",
    "A photo of a CAFÉ.",
    "Ünïcödé — “quotes”, it's 50% &amp;amp; 10 €",
    "schÃ¶n, 日本語 العربية 👩‍👩‍👧‍👦",
    "!<start_of_text> <end_of_text> <|endoftext|> </s>",
    "many words " * 100,
)

Array = NDArray[np.float32]


def verify(
    directory: Path,
    source: Source,
    manifest: Manifest,
    precision: str,
    images: Sequence[Inputs] = (),
) -> dict[str, float]:
    """Compare the exported encoders, run by ONNX Runtime, with PyTorch.

    images: batches of preprocessed images, for a precision whose ranges come from images; without them,
    the image encoders get random numbers, which such ranges would cut off.

    Returns the differences, for `Variant.parity`. Raises ExportError if one is above its limit (or not
    a number), or if tokenizer.json gives other ids than open_clip.
    """
    row, variant = PRECISIONS[precision], manifest.precisions[precision]
    image = OnnxEncoder(directory / variant.image_encoder, device="cpu")
    text = OnnxEncoder(directory / variant.text_encoder, device="cpu")
    tokens = None
    if variant.image_tokens is not None:
        tokens = OnnxEncoder(directory / variant.image_tokens, device="cpu", output=TOKENS)
    parity = {
        **_image_parity(image, tokens, source, images or _random_images(manifest)),
        **_text_parity(text, directory, source, manifest),
        **_golden_parity(image, text, directory),
    }
    for name, value in parity.items():
        is_cosine = name.endswith("cosine")
        limit = row.min_cosine if is_cosine else row.max_difference
        if limit is None:
            continue
        if "cut" in name:
            limit = CUT_LIMIT
        if not (value >= limit if is_cosine else value <= limit):
            raise ExportError(
                f"{precision} does not match PyTorch: {name} is {value:.3g} (limit {limit:g}); "
                "no bundle was written"
            )
    return parity


def _random_images(manifest: Manifest) -> list[Inputs]:
    rng = torch.Generator().manual_seed(0)
    shape = (3, *manifest.image.size)
    return [{"pixels": torch.randn(size, *shape, generator=rng).numpy()} for size in BATCHES]


@torch.no_grad()
def _image_parity(
    encoder: Encoder, token_encoder: Encoder | None, source: Source, images: Sequence[Inputs]
) -> dict[str, float]:
    reference, _ = image_encoder(source.model)
    expected, actual, expected_tokens, actual_tokens = [], [], [], []
    for batch in images:
        pixels = torch.from_numpy(batch["pixels"])
        expected.append(source.model.encode_image(pixels, normalize=True).numpy())
        actual.append(encoder.embed(pixels.numpy()))
        if token_encoder:
            expected_tokens.append(reference(pixels)[1].numpy())
            actual_tokens.append(token_encoder.embed(pixels.numpy()))
    parity = _compare("image", np.concatenate(actual), np.concatenate(expected))
    if token_encoder:
        difference = np.concatenate(actual_tokens) - np.concatenate(expected_tokens)
        norms = np.linalg.norm(np.concatenate(expected_tokens), axis=2)
        parity["tokens_max_rel_diff"] = float((np.linalg.norm(difference, axis=2) / norms).max())
    return parity


@torch.no_grad()
def _text_parity(
    encoder: Encoder, directory: Path, source: Source, manifest: Manifest
) -> dict[str, float]:
    ids, lengths = tokenize(directory, source, manifest, PROBES)
    expected = source.model.encode_text(ids, normalize=True).numpy()
    padded = encoder.embed(ids.numpy())
    if not manifest.text.dynamic_length:
        return _compare("text", padded, expected)
    rows = zip(ids.numpy(), lengths, strict=True)
    cut = np.concatenate([encoder.embed(row[None, :length]) for row, length in rows])
    parity = _compare("text", np.concatenate([padded, cut]), np.concatenate([expected, expected]))
    return parity | {"text_cut_max_abs_diff": float(abs(_unit(cut) - _unit(padded)).max())}


def _golden_parity(image: Encoder, text: Encoder, directory: Path) -> dict[str, float]:
    """Compare both encoders with the golden outputs, which devices are checked against later."""
    with np.load(directory / GOLDEN, allow_pickle=False) as arrays:
        images = image.embed(arrays["pixels"][None])
        texts = text.embed(arrays["ids"])
        return {
            **_compare("golden_image", images, arrays["embedding"][None]),
            **_compare("golden_text", texts, arrays["text_embeddings"]),
        }


def _compare(name: str, actual: Array, expected: Array) -> dict[str, float]:
    """Return the largest difference and smallest cosine of embeddings (N, D), made unit vectors."""
    a, b = _unit(actual), _unit(expected)
    return {
        f"{name}_max_abs_diff": float(abs(a - b).max()),
        f"{name}_min_cosine": float((a * b).sum(axis=1).min()),
    }


def _unit(rows: Array) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)  # so that a cosine of 1 is 1
    unit: NDArray[np.float64] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return unit
