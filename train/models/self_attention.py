"""Attention of open_clip's blocks, rewritten for export: the same function with fewer nodes.

nn.MultiheadAttention exports transposes of batch and tokens, shapes computed at run time and two
scalings. ONNX Runtime's optimiser removes none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Multi-head attention after the input projections: softmax(q k^T) v and the output projection."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.out_proj = attention.out_proj

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with scaled queries (B, Q, W) to keys and values (B, T, W); return (B, Q, W)."""
        queries, width = q.shape[1:]
        q, v = self._split_heads(q).transpose(1, 2), self._split_heads(v).transpose(1, 2)
        scores = q @ self._split_heads(k).permute(0, 2, 3, 1)
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2)
        output: Tensor = self.out_proj(mixed.reshape(-1, queries, width))
        return output

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.head_dim)


class SelfAttention(PlainAttention):
    """Replacement for an open_clip block's nn.MultiheadAttention."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention)
        scale = torch.ones(3 * attention.embed_dim)
        scale[: attention.embed_dim] = self.head_dim**-0.5  # of the queries
        self.weight = nn.Parameter(attention.in_proj_weight.detach() * scale[:, None])
        self.bias = nn.Parameter(attention.in_proj_bias.detach() * scale)

    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, None]:
        """Attend within tokens x (B, T, W); return the first `queries` (None: all) as (B, Q, W).

        key, value and need_weights match nn.MultiheadAttention's signature; unused in
        self-attention.
        """
        length, width = x.shape[1:]
        q, k, v = torch.split(F.linear(x, self.weight, self.bias), width, dim=-1)
        q = q if queries is None else q[:, :queries]
        if attn_mask is not None:
            if attn_mask.ndim == 3:  # CoCa's mask per prompt and head: (B * heads, T, T)
                attn_mask = attn_mask.reshape(-1, self.heads, length, length)
            attn_mask = attn_mask[..., :queries, :]
        return self.mix(q, k, v, attn_mask), None


class PoolAttention(PlainAttention):
    """Replacement for the nn.MultiheadAttention of open_clip's AttentionalPooler (CoCa)."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention)
        joint = attention.in_proj_weight  # None where keys and queries differ in width
        weights = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if joint is None
            else joint.chunk(3)
        )
        biases = attention.in_proj_bias.detach().chunk(3)
        scale = self.head_dim**-0.5
        self.query = nn.Parameter(weights[0].detach() * scale)
        self.query_bias = nn.Parameter(biases[0] * scale)
        self.pair = nn.Parameter(torch.cat([weight.detach() for weight in weights[1:]]))
        self.pair_bias = nn.Parameter(torch.cat(biases[1:]))

    def forward(
        self, queries: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Attend with queries (B, Q, W) to tokens (B, T, V), passed as key and as value."""
        q = F.linear(queries, self.query, self.query_bias)
        k, v = F.linear(key, self.pair, self.pair_bias).chunk(2, dim=-1)
        return self.mix(q, k, v), None


def is_plain(block: nn.Module) -> bool:
    """Tell whether SelfAttention can replace the attention of a block."""
    return (
        isinstance(block, ResidualAttentionBlock)
        and not hasattr(block, "ln_1_kv")
        and block.attn.batch_first
    )


def is_split(block: nn.Module) -> bool:
    """Tell whether `first_token` can run the block."""
    return isinstance(getattr(block, "attn", None), SelfAttention)


@contextmanager
def plain_attention(module: nn.Module) -> Iterator[None]:
    """Replace the attention of `module`'s blocks and poolers within the context; restore it after.

    Towers of transformers then also compute a plain softmax(q k^T) v.
    """
    towers = [x.transformer for x in module.modules() if isinstance(x, HFTextEncoder)]
    kinds = [tower.config._attn_implementation for tower in towers]
    originals = [
        (owner, cast("nn.MultiheadAttention", owner.attn))
        for owner in module.modules()
        if is_plain(owner) or isinstance(owner, AttentionalPooler)
    ]
    try:
        for tower in towers:
            tower.set_attn_implementation("eager")
        for owner, attention in originals:
            owner.attn = (SelfAttention if is_plain(owner) else PoolAttention)(attention)
        yield
    finally:
        for tower, kind in zip(towers, kinds, strict=True):
            tower.set_attn_implementation(kind)
        for owner, attention in originals:
            owner.attn = attention


def first_token(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """Compute block(x)[:, :1] without the work for the other tokens; within `plain_attention`."""
    attended, _ = block.attn(block.ln_1(x), queries=1)
    x = x[:, :1] + block.ls_1(attended)
    output: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return output
