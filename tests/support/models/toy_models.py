"""Toy models under attack."""

from __future__ import annotations

import types

import torch
from torch import nn

from edgeclip.purify import Purifier
from train.models.classifier import Classifier
from train.models.prior import DiffusionPrior, Shape
from train.robustness.defence import Defence
from train.robustness.purification import NullPrior


def toy(classes: int = 5, side: int = 8, purifier: Purifier = None, seed: int = 0) -> Defence:
    """Return a defence whose every number is known: class k is sign pattern k."""
    patterns = Patterns(classes, side, seed)
    texts = 0.8 * torch.eye(classes + 1)[1:]
    texts[:, 0] = 0.6
    source = types.SimpleNamespace(model=patterns)
    return Defence(
        Classifier(source, texts, tokens=False), torch.eye(classes + 1)[0], purifier
    ).eval()


def toy_images(
    defence: Defence, count: int, weakest: float = 4 / 255, strongest: float = 20 / 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and classes: the class's pattern in slight noise, from faint to clear."""
    patterns = defence.model.encoder.model
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % len(patterns.signs)
    strength = torch.linspace(weakest, strongest, count)[torch.randperm(count, generator=rng)]
    side = patterns.visual.preprocess_cfg["size"][0]
    pixels = strength[:, None] * patterns.signs.detach()[labels]
    pixels = 0.5 + pixels + 0.01 * torch.randn(pixels.shape, generator=rng)
    return pixels.view(count, 3, side, side).clamp(0, 1), labels


def null_prior(dim: int, seed: int = 0, *, exact: bool = True, size: float = 0.3) -> NullPrior:
    """Return a small prior in float64, with a text; its prediction depends on every input."""
    torch.manual_seed(seed)
    prior = DiffusionPrior(Shape(dim, depth=1, heads=1))
    for parameter in prior.parameters():
        parameter.data += size * torch.randn_like(parameter)
    prior.double().requires_grad_(False)
    with torch.no_grad():
        context = prior.context(
            torch.randn(1, dim, dtype=torch.float64), torch.randn(1, 5, dim, dtype=torch.float64)
        )
    return NullPrior(prior, context, exact=exact).eval()


class Patterns(nn.Module):
    """Part of an open_clip model that a Classifier needs: an encoder of sign patterns.

    The first dimension is the same for all images: their embeddings lie around it, as those of CLIP
    lie around the prompts without a class.
    """

    def __init__(self, classes: int, side: int, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        pixels = 3 * side * side
        self.signs = nn.Parameter(torch.randn(classes, pixels, generator=rng).sign())
        self.logit_scale = torch.tensor(20.0).log()
        cfg = {"size": (side, side), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        self.visual = types.SimpleNamespace(preprocess_cfg=cfg)

    def encode_image(self, pixels: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert not normalize
        flat = pixels.flatten(1)
        similarity = flat @ self.signs.T / flat.shape[1]
        return torch.cat([torch.full_like(similarity[:, :1], 0.06), similarity], dim=1)
