"""open_clip's attention blocks as a graph that runtimes run fast: the same function, fewer nodes.

nn.MultiheadAttention exports with the batch and the tokens exchanged and back again, shapes computed
at run time and two scalings, none of which ONNX Runtime's optimiser sees through.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """The self-attention of an nn.MultiheadAttention, called as open_clip's blocks call it."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.num_heads, attention.head_dim
        scale = torch.ones(3 * attention.embed_dim)
        scale[: attention.embed_dim] = self.head_dim**-0.5  # of the queries
        self.weight = nn.Parameter(attention.in_proj_weight.detach() * scale[:, None])
        self.bias = nn.Parameter(attention.in_proj_bias.detach() * scale)
        self.out_proj = attention.out_proj

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
        q, v = self._split(q).transpose(1, 2), self._split(v).transpose(1, 2)
        scores = q @ self._split(k).permute(0, 2, 3, 1)
        if attn_mask is not None:
            scores = scores + attn_mask[:queries]
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2)
        return self.out_proj(mixed.reshape(-1, queries or length, width)), None

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[1], self.heads, self.head_dim)


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
    """SelfAttention in every usual block of `module`, and their own attention again afterwards."""
    blocks = [block for block in module.modules() if is_plain(block)]
    own = [block.attn for block in blocks]
    try:
        for block in blocks:
            block.attn = SelfAttention(block.attn)
        yield
    finally:
        for block, attention in zip(blocks, own, strict=True):
            block.attn = attention


def first_token(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """block(x)[:, :1] without the work for the other tokens; within `plain_attention`."""
    attended, _ = block.attn(block.ln_1(x), queries=1)
    x = x[:, :1] + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))
