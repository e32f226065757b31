"""The image towers of open_clip's models as one interface: an embedding, and patch tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from edgeclip.manifest import TokenSpec


class PooledImageEncoder(nn.Module):
    """Any image tower: pixels (B, 3, H, W) -> embedding (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.model.encode_image(pixels, normalize=False),)


class VitImageEncoder(nn.Module):
    """open_clip's ViT: pixels -> embedding (B, D), tokens (B, prefix + P, D).

    Tokens are those of the last block after ln_post and the projection. With class-token pooling
    the class token comes first, and is the embedding.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = copy.copy(visual)  # shares the weights; the caller's gives no tokens
        self.visual.output_tokens = True
        self.prefix = int(visual.pool_type == "tok")

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        embedding, patches = self.visual(pixels)
        tokens = patches @ self.visual.proj
        if self.prefix:
            tokens = torch.cat([embedding[:, None], tokens], dim=1)
        return embedding, tokens


class MapPoolImageEncoder(nn.Module):
    """SigLIP's ViT from timm: pixels -> embedding (B, D), tokens (B, prefix + P, D).

    Tokens are what its attention pooling reads: in the embedding's space, and without a class token.
    """

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tokens = self.visual.trunk.forward_features(pixels)
        return self.visual.head(self.visual.trunk.forward_head(tokens)), tokens


def image_encoder(model: Any) -> tuple[nn.Module, TokenSpec | None]:
    """The module to export for `model`'s images, and what its tokens are where it has them."""
    visual = model.visual
    if isinstance(visual, VisionTransformer) and _has_vit_tokens(visual):
        vit = VitImageEncoder(visual)
        return vit, TokenSpec(tuple(visual.grid_size), vit.prefix)
    if isinstance(visual, TimmModel) and _has_map_tokens(visual):
        trunk = visual.trunk
        spec = TokenSpec(tuple(trunk.patch_embed.grid_size), trunk.num_prefix_tokens)
        return MapPoolImageEncoder(visual), spec
    return PooledImageEncoder(model), None


def _has_vit_tokens(visual: VisionTransformer) -> bool:
    """Whether every token goes through ln_post and the projection, as the embedding does."""
    return (
        visual.attn_pool is None
        and not visual.final_ln_after_pool
        and visual.pool_type in ("tok", "avg")
        and visual.proj is not None
        and not visual.output_tokens
    )


def _has_map_tokens(visual: TimmModel) -> bool:
    """Whether the tokens that attention pooling reads live in the space of the embedding."""
    trunk = visual.trunk
    return (
        getattr(trunk, "global_pool", None) == "map"
        and isinstance(getattr(trunk, "head", None), nn.Identity)
        and len(visual.head) == 0
    )
