"""open_clip's attention blocks as a graph that runtimes run fast: the same function, fewer nodes.

nn.MultiheadAttention exports with the batch and the tokens exchanged and back again, shapes computed
at run time and two scalings, none of which ONNX Runtime's optimiser sees through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """The part of an nn.MultiheadAttention behind its three projections."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        self.out_proj = attention.out_proj

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scaled queries (B, Q, W), keys and values (B, T, W) -> (B, Q, W)."""
        queries, width = q.shape[1:]
        q, v = self._split(q).transpose(1, 2), self._split(v).transpose(1, 2)
        scores = q @ self._split(k).permute(0, 2, 3, 1)
        if mask is not None:
            scores = scores + mask
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2)
        return self.out_proj(mixed.reshape(-1, queries, width))

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.head_dim)


class SelfAttention(PlainAttention):
    """The self-attention of an nn.MultiheadAttention, called as open_clip's blocks call it."""

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
        """Tokens (B, T, W) -> (B, queries, W): of the first `queries` tokens, None for all.

        key, value and need_weights are there for the call's sake: both are x, and none are given.
        """
        length, width = x.shape[1:]
        q, k, v = F.linear(x, self.weight, self.bias).split(width, dim=-1)
        q = q if queries is None else q[:, :queries]
        if attn_mask is not None:
            if attn_mask.ndim == 3:  # CoCa's, one for each prompt and head: (B * heads, T, T)
                attn_mask = attn_mask.reshape(-1, self.heads, length, length)
            attn_mask = attn_mask[..., :queries, :]
        return self.mix(q, k, v, attn_mask), None


class PoolAttention(PlainAttention):
    """The attention of CoCa's pooling, called as open_clip's AttentionalPooler calls it."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention)
        same = attention.in_proj_weight  # None where keys are of another width than queries
        weights = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if same is None
            else same.chunk(3)
        )
        biases = attention.in_proj_bias.detach().chunk(3)
        scale = self.head_dim**-0.5  # of the queries
        self.query = nn.Parameter(weights[0].detach() * scale)
        self.query_bias = nn.Parameter(biases[0] * scale)
        self.pair = nn.Parameter(torch.cat([weight.detach() for weight in weights[1:]]))
        self.pair_bias = nn.Parameter(torch.cat(biases[1:]))

    def forward(
        self, queries: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Queries (B, Q, W) and tokens (B, T, V), as key and as value -> (B, Q, W)."""
        q = F.linear(queries, self.query, self.query_bias)
        k, v = F.linear(key, self.pair, self.pair_bias).chunk(2, dim=-1)
        return self.mix(q, k, v), None


def is_plain(block: nn.Module) -> bool:
    """Whether a block is open_clip's usual one, whose attention SelfAttention stands in for."""
    return (
        isinstance(block, ResidualAttentionBlock)
        and not hasattr(block, "ln_1_kv")
        and block.attn.batch_first
    )


def is_split(block: nn.Module) -> bool:
    """Whether `first_token` can take the block."""
    return isinstance(getattr(block, "attn", None), SelfAttention)


@contextmanager
def plain_attention(module: nn.Module) -> Iterator[None]:
    """Put SelfAttention into every usual block of `module` and PoolAttention into its pooling, and
    their own attention back afterwards."""
    own = [
        (part, part.attn, SelfAttention if is_plain(part) else PoolAttention)
        for part in module.modules()
        if is_plain(part) or isinstance(part, AttentionalPooler)
    ]
    try:
        for part, attention, plain in own:
            part.attn = plain(attention)
        yield
    finally:
        for part, attention, _ in own:
            part.attn = attention


def first_token(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """block(x)[:, :1] without the work for the other tokens; within `plain_attention`."""
    attended, _ = block.attn(block.ln_1(x), queries=1)
    x = x[:, :1] + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))
