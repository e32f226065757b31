"""What each way of adversarial fine-tuning attacks, and what it lowers.

tga    cross-entropy and two attention terms (TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802)
comp   the same with complementary attention (Comp-TGA, arXiv 2603.18598)
tecoa  cross-entropy against the texts (TeCoA, Mao et al., ICLR 2023, arXiv 2212.07016)
at     the same with class weights that are trained too (Madry et al., ICLR 2018, arXiv 1706.06083)
pmg    cross-entropy and two divergences (PMG-AFT, Wang et al., CVPR 2024, arXiv 2401.04350)
fare   distance of the embedding, without labels (FARE, Schlarmann et al., ICML 2024, arXiv 2402.12336)
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from train.attacks import pgd
from train.attention import attention_map, complementary_attention_map
from train.data.loader import generators
from train.losses import pmg_terms, squared_distance, tga_terms
from train.models.classifier import Classifier, Output

# The published weights of the two terms beside the cross-entropy; for pmg our choice.
WEIGHTS = {
    "tga": (0.08, 0.05),
    "comp": (0.10, 0.07),
    "tecoa": (0.0, 0.0),
    "at": (0.0, 0.0),
    "pmg": (1.0, 1.0),
    "fare": (0.0, 0.0),
}


class Objective(Protocol):
    """The settings that an attack and a loss are made of; see train.tgazsr."""

    variant: str
    alpha: float
    beta: float
    distance: str
    eps: float
    step_size: float
    norm: str


def loss_terms(
    settings: Objective,
    trained: nn.Module,
    original: Classifier,
    negations: torch.Tensor,
    images: torch.Tensor,
    attacked: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The terms of the variant's loss by name, for images and attacked ones (B, 3, S, S).

    The trained encoder runs once, on all images together: what DistributedDataParallel expects.
    """
    if settings.variant == "fare":
        with torch.no_grad():
            target = original(images).embedding
        return {"fare": squared_distance(trained(attacked).embedding, target).mean()}
    if settings.variant in ("tecoa", "at"):
        return {"ce": F.cross_entropy(trained(attacked).logits, labels)}
    both = trained(torch.cat([attacked, images]))
    adv, clean = (Output(*(x.chunk(2)[i] for x in both)) for i in range(2))
    weights = {"alpha": settings.alpha, "beta": settings.beta}
    if settings.variant == "pmg":
        with torch.no_grad():
            reference = original(attacked).logits
        terms = pmg_terms(adv.logits, labels, reference, clean.logits, **weights)
        return dict(zip(("ce", "general", "clean"), terms, strict=True))
    with torch.no_grad():
        source = original(images)
    text, denied = original.classes[labels], negations[labels]

    def attention(tokens: torch.Tensor) -> torch.Tensor:
        size, prefix = images.shape[-1], original.token_spec.prefix
        if settings.variant == "comp":
            return complementary_attention_map(tokens, text, denied, size, prefix=prefix)
        return attention_map(tokens, text, size, prefix=prefix)

    maps = (attention(output.tokens) for output in (adv, source, clean))
    terms = tga_terms(adv.logits, labels, *maps, **weights, distance=settings.distance)
    return dict(zip(("ce", "ar", "amc"), terms, strict=True))


def attack(
    settings: Objective,
    model: Classifier,
    original: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    seeds: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """The images that the variant trains on: fare raises the embedding's distance, others the loss."""
    fare = settings.variant == "fare"
    with torch.no_grad():
        target = original(images).embedding if fare else labels
    return pgd(
        lambda x: model(x).embedding if fare else model(x).logits,
        images,
        target,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=steps,
        norm=settings.norm,
        loss=squared_distance if fare else "ce",
        generator=generators(seeds, images.device),
    )
