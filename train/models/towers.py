"""Image towers of open_clip models behind one interface: an embedding, and patch tokens."""

from __future__ import annotations

import copy
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from edgeclip.manifest import TokenSpec
from train.models.self_attention import first_token, is_split


class PooledImageEncoder(nn.Module):
    """Image tower of any kind: pixels (B, 3, H, W) -> embedding (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.model.encode_image(pixels, normalize=False),)


class VitImageEncoder(nn.Module):
    """Image tower of open_clip's ViT: pixels -> embedding (B, D), tokens (B, prefix + P, D).

    Tokens are the last block's output after ln_post and the projection. With class-token pooling,
    the class token comes first and equals the embedding. It has its own path through the last block,
    so a runtime that asks for the embedding alone skips most of that block's work.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual, self.prefix = visual, int(visual.pool_type == "tok")
        self.trunk = _shallow_copy(visual)  # everything before the last block
        self.trunk.transformer = _shallow_copy(visual.transformer)
        self.trunk.transformer.resblocks = visual.transformer.resblocks[:-1]
        self.trunk.ln_post, self.trunk.pool_type = nn.Identity(), "none"
        self.trunk.proj = None

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        hidden, last = self.trunk(pixels), self.visual.transformer.resblocks[-1]
        if not self.prefix:
            patches = self.visual.ln_post(last(hidden))[:, 1:]
            return patches.mean(dim=1) @ self.visual.proj, patches @ self.visual.proj
        tokens = self.visual.ln_post(last(hidden)) @ self.visual.proj
        if not is_split(last):
            return tokens[:, 0], tokens
        return self.visual.ln_post(first_token(last, hidden))[:, 0] @ self.visual.proj, tokens


def _shallow_copy(module: Any) -> Any:
    """Copy a module, sharing its weights; setting a submodule of the copy leaves the original."""
    twin = copy.copy(module)
    twin._modules, twin._parameters = dict(module._modules), dict(module._parameters)
    return twin


class MapPoolImageEncoder(nn.Module):
    """Image tower of SigLIP, from timm: pixels -> embedding (B, D), tokens (B, prefix + P, D).

    Tokens are the input of the attention pooling. They share the embedding's space; none of them is a
    class token.
    """

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        tokens = self.visual.trunk.forward_features(pixels)
        return self.visual.head(self.visual.trunk.forward_head(tokens)), tokens


def image_encoder(model: Any) -> tuple[nn.Module, TokenSpec | None]:
    """Return the module to export for `model`'s images, and its token layout if it has tokens."""
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
    """Tell whether ln_post and the projection apply to every token, as to the embedding."""
    return (
        visual.attn_pool is None
        and not visual.final_ln_after_pool
        and visual.pool_type in ("tok", "avg")
        and visual.proj is not None
        and not visual.output_tokens
    )


def _has_map_tokens(visual: TimmModel) -> bool:
    """Tell whether the input tokens of the attention pooling share the embedding's space."""
    trunk = visual.trunk
    return (
        getattr(trunk, "global_pool", None) == "map"
        and isinstance(getattr(trunk, "head", None), nn.Identity)
        and len(visual.head) == 0
    )
