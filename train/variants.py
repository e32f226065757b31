"""Variants of adversarial fine-tuning: their attacks and their losses.

tga    cross-entropy and two attention terms (TGA-ZSR, Yu et al., NeurIPS 2024, arXiv 2410.21802)
comp   TGA-ZSR with complementary attention (Comp-TGA, arXiv 2603.18598)
tecoa  cross-entropy against the texts (TeCoA, Mao et al., ICLR 2023, arXiv 2212.07016)
at     cross-entropy with class weights that are trained too (Madry et al., ICLR 2018, arXiv 1706.06083)
pmg    cross-entropy and two divergences (PMG-AFT, Wang et al., CVPR 2024, arXiv 2401.04350)
fare   distance of the embedding, without labels (FARE, Schlarmann et al., ICML 2024, arXiv 2402.12336)
distil divergence from the original's clean probabilities (ARD, Goldblum et al., AAAI 2020, arXiv 1905.09747)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from train.attacks import LOSSES, pgd
from train.attention import attention_map, complementary_attention_map
from train.data.loader import generators
from train.losses import divergence, pmg_terms, squared_distance, tga_terms
from train.models.classifier import Classifier, Output

# Default alpha and beta, the weights of the second and third term: as published; for pmg and distil our
# choice. None for a loss of one term.
WEIGHTS: dict[str, tuple[float, float] | None] = {
    "tga": (0.08, 0.05),
    "comp": (0.10, 0.07),
    "tecoa": None,
    "at": None,
    "pmg": (1.0, 1.0),
    "fare": None,
    "distil": (0.0, 0.0),
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


@dataclass(frozen=True, eq=False)
class Batch:
    """Images (B, 3, S, S) in [0, 1], labels int64 (B,), a seed int64 (B,) of each image's noise."""

    original: Classifier  # with the weights before training
    images: torch.Tensor
    labels: torch.Tensor
    seeds: torch.Tensor

    @cached_property
    def reference(self) -> Output:
        """Output of the original encoder for the images, which the attack and the loss share."""
        with torch.no_grad():
            output: Output = self.original(self.images)
        return output


def term_weights(settings: Objective) -> tuple[float, float]:
    """Return alpha and beta; a setting that is None has the variant's default."""
    alpha, beta = WEIGHTS[settings.variant] or (0.0, 0.0)
    return (
        alpha if settings.alpha is None else settings.alpha,
        beta if settings.beta is None else settings.beta,
    )


def needs_labels(settings: Objective) -> bool:
    """Tell whether the loss reads the labels of the images."""
    _, beta = term_weights(settings)
    return settings.variant != "fare" and (settings.variant != "distil" or beta > 0)


def loss_terms(
    settings: Objective,
    trained: nn.Module,
    batch: Batch,
    negations: torch.Tensor,
    attacked: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return the weighted terms of the variant's loss, by name; their sum is the loss.

    attacked: the batch's images after the attack. negations: unit text embeddings (K, D) of the
    classes' negations, which comp alone uses. The trained encoder runs once, on all images together:
    DistributedDataParallel needs that.
    """
    if settings.variant == "fare":
        target = batch.reference.embedding
        return {"fare": squared_distance(trained(attacked).embedding, target).mean()}
    if settings.variant in ("tecoa", "at"):
        return {"ce": F.cross_entropy(trained(attacked).logits, batch.labels)}
    alpha, beta = term_weights(settings)
    if settings.variant == "distil":
        return _distil_terms(trained, batch, attacked, alpha, beta)
    both = trained(torch.cat([attacked, batch.images]))
    adv, clean = (Output(*(x.chunk(2)[i] for x in both)) for i in range(2))
    original, labels = batch.original, batch.labels
    if settings.variant == "pmg":
        with torch.no_grad():
            reference = original(attacked).logits
        terms = pmg_terms(adv.logits, labels, reference, clean.logits, alpha=alpha, beta=beta)
        return dict(zip(("ce", "general", "clean"), terms, strict=True))
    text, negated, size = original.classes[labels], negations[labels], attacked.shape[-1]

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
        attention(batch.reference),
        attention(clean),
        alpha=alpha,
        beta=beta,
        distance=settings.distance,
    )
    return dict(zip(("ce", "ar", "amc"), terms, strict=True))


def _distil_terms(
    trained: nn.Module, batch: Batch, attacked: torch.Tensor, alpha: float, beta: float
) -> dict[str, torch.Tensor]:
    """Return the divergence on the attacked images, alpha times that on the clean, beta * cross-entropy.

    A term of weight 0 is left out, with its work.
    """
    images = torch.cat([attacked, batch.images]) if alpha else attacked
    adv, *clean = trained(images).logits.split(len(attacked))
    target = batch.reference.logits
    terms = {"distil": divergence(adv, target).mean()}
    if alpha:
        terms["clean"] = alpha * divergence(clean[0], target).mean()
    if beta:
        terms["ce"] = beta * F.cross_entropy(adv, batch.labels)
    return terms


def attack(settings: Objective, model: Classifier, batch: Batch, steps: int) -> torch.Tensor:
    """Attack the batch's images by PGD, as the variant trains on them.

    fare and distil raise the distance from the original encoder's output on the clean images, the
    others the cross-entropy.
    """
    fare = settings.variant == "fare"
    target, loss = batch.labels, LOSSES["ce"]
    if fare:
        target, loss = batch.reference.embedding, squared_distance
    elif settings.variant == "distil":
        target, loss = batch.reference.logits, divergence
    return pgd(
        lambda x: model(x).embedding if fare else model(x).logits,
        batch.images,
        target,
        eps=settings.eps,
        step_size=settings.step_size,
        steps=steps,
        norm=settings.norm,
        loss=loss,
        generator=generators(batch.seeds, batch.images.device),
    )
