"""Models of full size with random weights: `pytest -m slow tests/export/test_slow.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import Bundle
from edgeclip.text.tokenizer import Tokenizer
from export.bundle import export_bundle
from tests.support.models.export_models import source_of
from tests.support.texts import AWKWARD
from train.models.wording import wording

NAMES = [
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-B-16",
    "ViT-L-14",
    "RN50",
    "convnext_base",
    "ViT-B-16-SigLIP",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_size_models(name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path)
    export_bundle(source, tmp_path / "bundle", wording(source))
    bundle = Bundle(tmp_path / "bundle")
    manifest, model = bundle.manifest, source.model
    print(name, dict(manifest.precisions["fp32"].parity))

    text = manifest.text
    ids = source.tokenizer(AWKWARD)
    ours = Tokenizer(
        bundle.file("tokenizer.json"), context_length=text.context_length, clean=text.clean
    )(AWKWARD)
    padded = [row + [text.pad_id] * (text.context_length - len(row)) for row in ours]
    assert padded == ids.tolist()

    pixels = torch.randn(3, 3, *manifest.image.size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted_images = model.encode_image(pixels, normalize=True).numpy()
        wanted_texts = model.encode_text(ids[:8], normalize=True).numpy()
    images = OnnxEncoder(bundle.encoder("image_encoder", "fp32"), device="cpu")
    texts = OnnxEncoder(bundle.encoder("text_encoder", "fp32"), device="cpu")
    length = max(map(len, ours[:8])) if text.dynamic_length else text.context_length
    for actual, expected in (
        (images.embed(pixels.numpy()), wanted_images),
        (texts.embed(ids[:8, :length].numpy()), wanted_texts),
    ):
        cosine = (actual / np.linalg.norm(actual, axis=1, keepdims=True) * expected).sum(axis=1)
        print(name, "smallest cosine", cosine.min())
        assert cosine.min() >= 0.99999
