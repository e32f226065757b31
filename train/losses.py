"""Losses of TGA-ZSR (Yu et al., NeurIPS 2024, arXiv 2410.21802, section 3) and its baselines."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Distance of two batches of attention maps, each flattened to (B, pixels): one number.
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l2": lambda a, b: (a - b).norm(dim=1).mean(),  # not squared
    "l1": lambda a, b: (a - b).abs().mean(),
    "cos": lambda a, b: (1 - F.cosine_similarity(a, b, dim=1)).mean(),
}


def tga_terms(
    logits_adv: torch.Tensor,
    labels: torch.Tensor,
    adv_target: torch.Tensor,
    clean_original: torch.Tensor,
    clean_target: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    distance: str = "l2",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted terms of TGA-ZSR's loss: cross-entropy, alpha * L_AR, beta * L_AMC.

    logits_adv: (B, K), of the attacked images. labels: int64 (B,). adv_target, clean_target:
    attention maps (B, 1, S, S) of the attacked and the clean images, by the trained encoder.
    clean_original: those of the clean images, by the original encoder. L_AR is the distance of
    adv_target to clean_original, L_AMC that of clean_target. The loss is the sum of the terms.
    Raises ValueError for negative weights, or a distance other than l2, l1 or cos.
    """
    if alpha < 0 or beta < 0:
        raise ValueError(f"alpha and beta must be 0 or more, got {alpha} and {beta}")
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {distance!r}")
    measure = DISTANCES[distance]
    original = clean_original.flatten(1)
    return (
        F.cross_entropy(logits_adv, labels),
        alpha * measure(adv_target.flatten(1), original),
        beta * measure(clean_target.flatten(1), original),
    )


def pmg_terms(
    logits_adv: torch.Tensor,
    labels: torch.Tensor,
    logits_adv_original: torch.Tensor,
    logits_clean: torch.Tensor,
    *,
    alpha: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the terms of PMG-AFT's loss: cross-entropy, alpha * L_general and beta * L_clean.

    Wang et al., CVPR 2024, arXiv 2401.04350. logits_adv, logits_adv_original: (B, K), of the
    attacked images by the trained and by the original encoder. logits_clean: (B, K), of the clean
    images by the trained encoder. labels: int64 (B,). L_general is KL(original || trained) on the
    attacked images, L_clean is KL(clean || attacked) by the trained encoder.
    """
    return (
        F.cross_entropy(logits_adv, labels),
        alpha * divergence(logits_adv, logits_adv_original).mean(),
        beta * divergence(logits_adv, logits_clean).mean(),
    )


def divergence(
    logits: torch.Tensor, original: torch.Tensor, similar: torch.Tensor | None = None
) -> torch.Tensor:
    """Return KL(softmax(original) || softmax(logits)) of each image, (B,), summed over classes.

    similar: stochastic matrix (K, K) that both distributions are multiplied by. It spreads each class
    over those like it, so that a change between like classes counts less.

    Distillation under attack raises it in the attack and lowers it in training, with `original` the
    logits (B, K) of the clean images (ARD, Goldblum et al., AAAI 2020, arXiv 1905.09747; the
    divergence of TRADES, Zhang et al., ICML 2019, arXiv 1901.08573).
    """
    target, trained = F.log_softmax(original, 1), F.log_softmax(logits, 1)
    if similar is not None:
        target, trained = ((x.exp() @ similar).log() for x in (target, trained))
    return F.kl_div(trained, target, log_target=True, reduction="none").sum(1)


def squared_distance(embedding: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Return |f(x_adv) - f_original(x)|^2 of each image, (B,).

    FARE's attack raises it and its training lowers it (Schlarmann et al., ICML 2024, equation 3).
    The embeddings (B, D) are not normalised.
    """
    return (embedding - original).square().sum(1)
