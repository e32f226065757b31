"""Does the bundle say what PyTorch says? The golden input, and the differences that were measured.

golden.npz, all of it made by open_clip and PyTorch:

    image             uint8 (H, W, 3)    a picture larger than the input, and not square
    pixels            float32 (3, h, w)  the picture after open_clip's own preprocessing
    embedding         float32 (D,)       its unit embedding
    prompts           str (4,)           of different lengths
    ids               int64 (4, L)       padded to the longest, or to the full context length
    text_embeddings   float32 (4, D)     their unit embeddings
"""

from __future__ import annotations

import statistics
import time
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
from export.graphs.encoders import image_encoder
from train.models.checkpoints import Source

CUT_LIMIT = 1e-5  # of unit text embeddings, between ids cut at their end and ids of full length
BATCHES = (1, 2, 5)
ROUNDS = 7  # of timing

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


def verify(directory: Path, source: Source, manifest: Manifest, precision: str) -> dict[str, float]:
    """Run the exported encoders with ONNX Runtime and compare them with PyTorch.

    Returns the differences measured, for `Variant.parity`. Raises ExportError where one is above
    its limit (or not a number), or where tokenizer.json gives other ids than open_clip.
    """
    row, variant = PRECISIONS[precision], manifest.precisions[precision]
    image = OnnxEncoder(directory / variant.image_encoder, device="cpu")
    text = OnnxEncoder(directory / variant.text_encoder, device="cpu")
    tokens = None
    if variant.image_tokens is not None:
        tokens = OnnxEncoder(directory / variant.image_tokens, device="cpu", output=TOKENS)
    parity = {
        **_image_parity(image, tokens, source, manifest),
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
                f"{precision} is not what PyTorch computes: {name} is {value:.3g} "
                f"(limit {limit:g}); no bundle was written"
            )
    return parity


@torch.no_grad()
def _image_parity(
    encoder: Encoder, token_encoder: Encoder | None, source: Source, manifest: Manifest
) -> dict[str, float]:
    wrapper, _ = image_encoder(source.model)
    generator = torch.Generator().manual_seed(0)
    wanted, found, wanted_tokens, found_tokens = [], [], [], []
    for size in BATCHES:
        pixels = torch.randn(size, 3, *manifest.image.size, generator=generator)
        wanted.append(source.model.encode_image(pixels, normalize=True).numpy())
        found.append(encoder.embed(pixels.numpy()))
        if token_encoder:
            wanted_tokens.append(wrapper(pixels)[1].numpy())
            found_tokens.append(token_encoder.embed(pixels.numpy()))
    parity = _compare("image", np.concatenate(found), np.concatenate(wanted))
    if token_encoder:
        difference = np.concatenate(found_tokens) - np.concatenate(wanted_tokens)
        norms = np.linalg.norm(np.concatenate(wanted_tokens), axis=2)
        parity["tokens_max_rel_diff"] = float((np.linalg.norm(difference, axis=2) / norms).max())
    return parity


@torch.no_grad()
def _text_parity(
    encoder: Encoder, directory: Path, source: Source, manifest: Manifest
) -> dict[str, float]:
    ids, lengths = tokenize(directory, source, manifest, PROBES)
    wanted = source.model.encode_text(ids, normalize=True).numpy()
    whole = encoder.embed(ids.numpy())
    if not manifest.text.dynamic_length:
        return _compare("text", whole, wanted)
    cut = [
        encoder.embed(row[None, :length]) for row, length in zip(ids.numpy(), lengths, strict=True)
    ]
    parity = _compare("text", np.concatenate([whole, *cut]), np.concatenate([wanted, wanted]))
    difference = _unit(np.concatenate(cut)) - _unit(whole)
    return parity | {"text_cut_max_abs_diff": float(abs(difference).max())}


def _golden_parity(image: Encoder, text: Encoder, directory: Path) -> dict[str, float]:
    """Compare each encoder with its golden outputs: a device that is much further off is wrong."""
    parity: dict[str, float] = {}
    with np.load(directory / GOLDEN, allow_pickle=False) as arrays:
        for kind, encoder, inputs, wanted in (
            ("image", image, arrays["pixels"][None], arrays["embedding"][None]),
            ("text", text, arrays["ids"], arrays["text_embeddings"]),
        ):
            parity |= _compare(f"golden_{kind}", encoder.embed(inputs), wanted)
    return parity


def _compare(name: str, found: Array, wanted: Array) -> dict[str, float]:
    """The largest difference of unit embeddings, and the smallest cosine; both (N, D)."""
    found, wanted = _unit(found), _unit(wanted)
    return {
        f"{name}_max_abs_diff": float(abs(found - wanted).max()),
        f"{name}_min_cosine": float((found * wanted).sum(axis=1).min()),
    }


def _unit(rows: Array) -> NDArray[np.float64]:
    rows = rows.astype(np.float64)  # so that a cosine of 1 is 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cpu_ms(directory: Path, manifest: Manifest) -> dict[str, float]:
    """How long each precision takes for one image on this machine, in milliseconds: the median of
    runs in which they take turns."""
    pixels = np.zeros((1, 3, *manifest.image.size), np.float32)
    encoders = {
        name: OnnxEncoder(directory / variant.image_encoder, device="cpu")
        for name, variant in manifest.precisions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            encoder.embed(pixels)  # the threads of the one before are still awake
            for _ in range(3):
                start = time.perf_counter()
                encoder.embed(pixels)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
