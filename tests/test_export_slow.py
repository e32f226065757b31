"""Models of full size with random weights: `pytest -m slow tests/test_export_slow.py`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from export_models import write_sentencepiece_like
from test_export_tokenizer import AWKWARD

from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import Bundle
from edgeclip.text.tokenizer import Tokenizer
from export.bundle import export_bundle
from train.models.checkpoints import Source, load
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


def source_of(name: str, folder: Path) -> Source:
    """The model with random weights; SigLIP's tokenizer is not to be had without a network."""
    if "SigLIP" not in name:
        return load(name, "random")
    config = {"model_cfg": open_clip.get_model_config(name)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    write_sentencepiece_like(folder)
    return load(str(folder), "random")


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
    for found, wanted in (
        (images.embed(pixels.numpy()), wanted_images),
        (texts.embed(ids[:8, :length].numpy()), wanted_texts),
    ):
        cosine = (found / np.linalg.norm(found, axis=1, keepdims=True) * wanted).sum(axis=1)
        print(name, "smallest cosine", cosine.min())
        assert cosine.min() >= 0.99999
