"""Exported attention against open_clip's modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock

from export.graphs import fp16
from tests.support.models.export_models import exported, run_graph
from train.models.self_attention import first_token, plain_attention


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("mask", ["none", "causal", "of each prompt and head"])
def test_block(mask: str) -> None:
    block, x = random_weights(ResidualAttentionBlock(24, 3)), torch.randn(4, 7, 24)
    masks = {
        "none": None,
        "causal": torch.full((7, 7), -torch.inf).triu(1),
        "of each prompt and head": torch.randn(4 * 3, 7, 7),  # CoCa's text tower
    }
    expected = block(x, attn_mask=masks[mask])
    with plain_attention(block):
        torch.testing.assert_close(block(x, attn_mask=masks[mask]), expected)
        if mask == "none":
            torch.testing.assert_close(first_token(block, x), expected[:, :1])
    assert isinstance(block.attn, torch.nn.MultiheadAttention)


@pytest.mark.parametrize("context", [24, 40])  # equal to the queries' width, and larger
def test_pooling(context: int) -> None:
    pooling = random_weights(AttentionalPooler(24, context, n_head=3, n_queries=5))
    x = torch.randn(4, 7, context)
    expected = pooling(x)
    with plain_attention(pooling):
        assert not isinstance(pooling.attn, torch.nn.MultiheadAttention)
        torch.testing.assert_close(pooling(x), expected)
    assert isinstance(pooling.attn, torch.nn.MultiheadAttention)


def test_onnx_runtime_loads_a_pooling_in_fp16(tmp_path: Path) -> None:
    """Guard against the crash of ONNX Runtime on the graph of nn.MultiheadAttention."""
    export = exported("coca")
    fp16.to_fp16(export.bundle.encoder("image_encoder", "fp32"), tmp_path / "half.onnx")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = torch.from_numpy(run_graph(tmp_path / "half.onnx", "embedding", pixels.numpy()))
    with torch.no_grad():
        expected = export.source.model.encode_image(pixels, normalize=False)
    assert torch.nn.functional.cosine_similarity(embeddings, expected).min() > 0.999
