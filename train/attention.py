"""Text-guided attention: the similarity of an image's patches to a text.

TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802, section 3.2; the complementary form is from
Comp-TGA, arXiv 2603.18598.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

TINY = 1e-12  # avoids a division by 0


def attention_map(
    tokens: torch.Tensor, text: torch.Tensor, image_size: int, *, prefix: int = 1
) -> torch.Tensor:
    """Return attention maps (B, 1, S, S) in [0, 1], with S = image_size.

    tokens: float (B, prefix + P, D), in the embedding's space (see train.models.towers), with
    `prefix` tokens (the class token, registers) before the patches; P is a square number. text:
    unit embeddings (B, D), one for each image. The map of an image whose patches have equal scores
    is zero. Raises ValueError for other shapes.
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
    """Return attention maps (B, 1, S, S): attention to the class times 1 - attention to its negation.

    non_class_text: unit embeddings (B, D) of "This is not a photo of a ...". The other arguments are
    those of `attention_map`.
    """
    attention, opposite = (
        _to_image(_patch_attention(tokens, embeddings, prefix), image_size, antialias=True)
        for embeddings in (text, non_class_text)
    )
    return attention * (1 - opposite)


def _to_image(patches: torch.Tensor, image_size: int, *, antialias: bool) -> torch.Tensor:
    """Resize attention of patches (B, 1, grid, grid) to (B, 1, S, S)."""
    size = (image_size, image_size)
    return F.interpolate(patches, size=size, mode="bilinear", antialias=antialias)


def _patch_attention(tokens: torch.Tensor, text: torch.Tensor, prefix: int) -> torch.Tensor:
    """Return the attention of each patch, (B, 1, grid, grid), scaled to [0, 1] in each image."""
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
    # As published: each feature is divided by its norm over the tokens.
    scaled = tokens / tokens.norm(dim=1, keepdim=True).clamp(min=TINY)
    scores = torch.einsum("bpd,bd->bp", scaled[:, prefix:], text)
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return ((scores - low) / (high - low).clamp(min=TINY)).reshape(-1, 1, grid, grid)
