"""The losses of TGA-ZSR (Yu et al., NeurIPS 2024, arXiv 2410.21802, section 3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Between two attention maps, each flattened to (B, pixels): one number for the batch.
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l2": lambda a, b: (a - b).norm(dim=1).mean(),  # over all pixels, not squared
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
    """The weighted terms whose sum is the loss: cross-entropy, alpha * L_AR, beta * L_AMC.

    logits_adv (B, K) of the attacked images, labels int64 (B,); attention maps (B, 1, S, S) of the
    attacked and the clean images by the trained encoder, and of the clean ones by the original.
    L_AR holds the attacked attention to the original's, L_AMC the clean one.
    Raises ValueError for negative weights or a distance that is not l2, l1 or cos.
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
