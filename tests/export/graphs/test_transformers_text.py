"""Exported text towers of Hugging Face transformers, compared with open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from export.graphs.encoders import export_text_encoder
from tests.support.models.export_models import exported, run_graph, write_folder
from train.models.checkpoints import Source, load
from train.progress import quiet

PROMPTS = ["", "a dog", "a photo [PAD] of <pad> two cats", "many words " * 20]


def tower(folder: Path, kind: str, **text: Any) -> Source:
    """Load a tiny model with these settings of the text tower and random weights."""
    write_folder(folder, kind)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= text
    path.write_text(json.dumps(config))
    source = load(str(folder), "random")
    with torch.no_grad():
        for parameter in source.model.text.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return source


@pytest.mark.parametrize(
    ("kind", "pooler", "projection"),
    [
        ("bert", "mean_pooler", "linear"),
        ("bert", "cls_pooler", None),
        ("bert", "cls_last_hidden_state_pooler", "mlp"),
        ("roberta", "mean_pooler", "mlp"),
    ],
)
@torch.no_grad()
def test_poolers_and_projections(
    tmp_path: Path, kind: str, pooler: str, projection: str | None
) -> None:
    source = tower(tmp_path, kind, hf_pooler_type=pooler, hf_proj_type=projection)
    pad = source.tokenizer.tokenizer.pad_token_id
    assert export_text_encoder(source.model, 24, pad, tmp_path / "text.onnx")
    ids = source.tokenizer(PROMPTS)
    expected = source.model.encode_text(ids)
    actual = run_graph(tmp_path / "text.onnx", "embedding", ids.numpy())
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_embeddings_do_not_depend_on_padding(family: str) -> None:
    tiny = exported(family)
    path = tiny.bundle.encoder("text_encoder", "fp32")
    ids = tiny.source.tokenizer(PROMPTS[:3])
    with torch.no_grad():
        expected = tiny.source.model.encode_text(ids, normalize=True).numpy()
    pad = tiny.bundle.manifest.text.pad_id
    for row, embedding in zip(ids.numpy(), expected, strict=True):
        used = np.flatnonzero(row != pad).max() + 1
        for length in (used, used + 1, used + 5, 24):
            actual = run_graph(path, "embedding", row[None, :length])[0]
            np.testing.assert_allclose(actual / np.linalg.norm(actual), embedding, atol=1e-6)


def test_other_padding_than_the_towers_keeps_the_full_length(tmp_path: Path) -> None:
    """open_clip then reads the padding as text, so an embedding depends on its length."""
    source = tower(tmp_path, "bert")
    assert not export_text_encoder(source.model, 24, 5, tmp_path / "text.onnx")


def test_a_model_is_left_with_its_own_attention() -> None:
    model = exported("bert").source.model
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(exported("bert").folder)
        other = open_clip.create_model("local-dir:.")
    names = [x.text.transformer.config._attn_implementation for x in (model, other)]
    assert names[0] == names[1]
