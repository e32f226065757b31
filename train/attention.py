"""Text-guided attention: which patches of an image speak for a text.

TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802, section 3.2; the complementary form is
Comp-TGA's, arXiv 2603.18598.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

TINY = 1e-12  # a divisor that is never 0


def attention_map(
    tokens: torch.Tensor, text: torch.Tensor, image_size: int, *, prefix: int = 1
) -> torch.Tensor:
    """Attention in [0, 1] over the image, (B, 1, S, S) with S = image_size.

    tokens: float (B, prefix + P, D), of the last block after ln_post and the projection, with
    `prefix` tokens (the class token, registers) before the patches; P is a square. text: unit
    embeddings (B, D), one for each image. An image whose patches all agree has no attention: zeros.
    Raises ValueError for shapes that do not fit.
    """
    return _to_image(_patch_attention(tokens, text, prefix), image_size, antialias=False)


def complementary_attention_map(
    tokens: torch.Tensor,
    text: torch.Tensor,
    non_class_text: torch.Tensor,
    image_size: int,
    *,
    prefix: int = 1,
) -> torch.Tensor:
    """Attention to the class where there is none to its negation, (B, 1, S, S).

    non_class_text: unit embeddings (B, D) of "This is not a photo of a ...". The rest as for
    `attention_map`.
    """
    attention, opposite = (
        _to_image(_patch_attention(tokens, words, prefix), image_size, antialias=True)
        for words in (text, non_class_text)
    )
    return attention * (1 - opposite)


def _to_image(patches: torch.Tensor, image_size: int, *, antialias: bool) -> torch.Tensor:
    size = (image_size, image_size)
    return F.interpolate(patches, size=size, mode="bilinear", antialias=antialias)


def _patch_attention(tokens: torch.Tensor, text: torch.Tensor, prefix: int) -> torch.Tensor:
    """Attention of each patch, (B, 1, grid, grid), stretched to [0, 1] in each image."""
    if tokens.ndim != 3 or text.shape != (tokens.shape[0], tokens.shape[2]):
        raise ValueError(
            "[attention_map] expected tokens (B, prefix + P, D) and text (B, D), "
            f"got {tuple(tokens.shape)} and {tuple(text.shape)}"
        )
    patches = tokens.shape[1] - prefix
    grid = math.isqrt(max(0, patches))
    if grid * grid != patches or grid == 0:
        raise ValueError(
            f"[attention_map] expected {prefix} tokens and a square of patches, "
            f"got {tokens.shape[1]} tokens"
        )
    # As published: the norm is that of each feature over the tokens, not of each token.
    scaled = tokens / tokens.norm(dim=1, keepdim=True).clamp(min=TINY)
    scores = torch.einsum("bpd,bd->bp", scaled[:, prefix:], text)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=TINY)).reshape(-1, 1, grid, grid)
