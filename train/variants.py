"""Variants of adversarial fine-tuning: their attacks and their losses.

tga    cross-entropy and two attention terms (TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802)
comp   TGA-ZSR with complementary attention (Comp-TGA, arXiv 2603.18598)
tecoa  cross-entropy against the texts (TeCoA, Mao et al., ICLR 2023, arXiv 2212.07016)
at     cross-entropy with class weights that are trained too (Madry et al., ICLR 2018, arXiv 1706.06083)
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

# Default alpha and beta, the weights of the second and third term: as published; for pmg our choice.
WEIGHTS = {
    "tga": (0.08, 0.05),
    "comp": (0.10, 0.07),
    "tecoa": (0.0, 0.0),
    "at": (0.0, 0.0),
    "pmg": (1.0, 1.0),
    "fare": (0.0, 0.0),
}


class Objective(Protocol):
    """Settings of an attack and a loss; see train.tgazsr."""

    @property
    def variant(self) -> str: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def beta(self) -> float | None: ...
    @property
    def distance(self) -> str: ...
    @property
    def eps(self) -> float: ...
    @property
    def step_size(self) -> float: ...
    @property
    def norm(self) -> str: ...


def term_weights(settings: Objective) -> tuple[float, float]:
    """Return alpha and beta; a setting that is None has the variant's default."""
    alpha, beta = WEIGHTS[settings.variant]
    return (
        alpha if settings.alpha is None else settings.alpha,
        beta if settings.beta is None else settings.beta,
    )


def loss_terms(
    settings: Objective,
    trained: nn.Module,
    original: Classifier,
    negations: torch.Tensor,
    images: torch.Tensor,
    attacked: torch.Tensor,
    labels: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return the weighted terms of the variant's loss, by name; their sum is the loss.

    images, attacked: (B, 3, S, S) in [0, 1]; labels: int64 (B,). negations: unit text embeddings
    (K, D) of the classes' negations, which comp alone uses. The trained encoder runs once, on all
    images together: DistributedDataParallel needs that.
    """
    if settings.variant == "fare":
        with torch.no_grad():
            target = original(images).embedding
        return {"fare": squared_distance(trained(attacked).embedding, target).mean()}
    if settings.variant in ("tecoa", "at"):
        return {"ce": F.cross_entropy(trained(attacked).logits, labels)}
    both = trained(torch.cat([attacked, images]))
    adv, clean = (Output(*(x.chunk(2)[i] for x in both)) for i in range(2))
    alpha, beta = term_weights(settings)
    if settings.variant == "pmg":
        with torch.no_grad():
            reference = original(attacked).logits
        terms = pmg_terms(adv.logits, labels, reference, clean.logits, alpha=alpha, beta=beta)
        return dict(zip(("ce", "general", "clean"), terms, strict=True))
    with torch.no_grad():
        source = original(images)
    text, negated, size = original.classes[labels], negations[labels], images.shape[-1]

    def attention(output: Output) -> torch.Tensor:
        if output.tokens is None or original.token_spec is None:
            raise ValueError(f"{settings.variant} needs an encoder with patch tokens")
        prefix = original.token_spec.prefix
        if settings.variant == "comp":
            return complementary_attention_map(output.tokens, text, negated, size, prefix=prefix)
        return attention_map(output.tokens, text, size, prefix=prefix)

    terms = tga_terms(
        adv.logits,
        labels,
        attention(adv),
        attention(source),
        attention(clean),
        alpha=alpha,
        beta=beta,
        distance=settings.distance,
    )
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
    """Attack images (B, 3, S, S) in [0, 1] by PGD, as the variant trains on them.

    fare raises the distance of the embedding from the original one, the others the cross-entropy.
    seeds: int64 (B,), one for each image.
    """
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
