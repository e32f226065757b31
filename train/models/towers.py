"""Image towers of open_clip models behind one interface: an embedding, and tokens of its places."""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from edgeclip.manifest import TokenSpec
from train.models.self_attention import first_token, is_split

POOLING_ERROR = 1e-3  # largest error of "the head sees the mean alone", in units of its variation


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


class FeatureMapImageEncoder(PooledImageEncoder):
    """Image tower from timm with average pooling: pixels -> embedding (B, D), tokens (B, P, D).

    Tokens are the places of the last feature map, row by row. Each goes through the head alone, as a
    map of 1 x 1. If what follows the pooling is linear, the embedding is their mean.
    """

    def __init__(self, model: Any, channels: int) -> None:
        """Build the encoder; `channels` is the feature map's axis of channels, 1 or 3."""
        super().__init__(model)  # names the weights as there: checkpoints of older runs have them
        self.channels = channels

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        visual = self.model.visual
        features = visual.trunk.forward_features(pixels)
        places = features.movedim(self.channels, 3).flatten(1, 2)
        shape = [-1, 1, 1, 1]  # contiguous: the exporter writes a Gather for other strides
        shape[self.channels] = places.shape[2]
        tokens = _head(visual, places.reshape(shape))
        return _head(visual, features), tokens.reshape(-1, places.shape[1], tokens.shape[1])


def _head(visual: TimmModel, features: Tensor) -> Tensor:
    """Return the embeddings (B, D) of feature maps."""
    embedding: Tensor = visual.head(visual.trunk.forward_head(features))
    return embedding


def image_encoder(model: Any) -> tuple[nn.Module, TokenSpec | None]:
    """Return the module to export for `model`'s images, and its token layout if it has tokens.

    `model` is in eval mode. A tower from timm runs once, on one image, to find its feature map.
    """
    visual = model.visual
    if isinstance(visual, VisionTransformer) and _has_vit_tokens(visual):
        vit = VitImageEncoder(visual)
        return vit, TokenSpec(tuple(visual.grid_size), vit.prefix)
    if isinstance(visual, TimmModel) and _has_map_tokens(visual):
        trunk = visual.trunk
        spec = TokenSpec(tuple(trunk.patch_embed.grid_size), trunk.num_prefix_tokens)
        return MapPoolImageEncoder(visual), spec
    if isinstance(visual, TimmModel):
        pixels = next(visual.parameters()).new_zeros(1, 3, *visual.image_size)
        with torch.no_grad():
            features = visual.trunk.forward_features(pixels)
        channels = _channel_axis(visual, features)
        if channels is not None:
            rows, columns = (features.shape[axis] for axis in (1, 2, 3) if axis != channels)
            return FeatureMapImageEncoder(model, channels), TokenSpec((rows, columns), 0)
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


@torch.no_grad()
def _channel_axis(visual: TimmModel, features: Any) -> int | None:
    """Return the axis of channels of a feature map, 1 or 3; None if its head pools in another way.

    The head applies to each place if all it sees is the mean over places: a random map and a map with
    that mean everywhere are pooled alike. Other poolings (attention, maximum) change the result.
    """
    if not isinstance(features, Tensor) or features.ndim != 4:
        return None
    rng = torch.Generator().manual_seed(0)
    maps = torch.randn(2, *features.shape[1:], generator=rng).to(features)
    pooled = visual.trunk.forward_head(maps)
    if pooled.ndim != 2:
        return None  # the pooling is in open_clip's head: attention
    variation = (pooled[0] - pooled[1]).norm()
    for channels, places in ((1, (2, 3)), (3, (1, 2))):
        even = maps.mean(places, keepdim=True).expand_as(maps)
        if (visual.trunk.forward_head(even) - pooled).norm() < POOLING_ERROR * variation:
            return channels
    return None
