"""Attacks on toy models."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.models.toy_models import toy_images
from train.robustness.defence import Defence
from train.robustness.threat import TargetImages, Threat, build

NATIVE = ("pgd", "cw", "feature")
EPS = {"linf": 8 / 255, "l2": 0.4}


def threat(norm: str = "linf", **changes: Any) -> Threat:
    eps = EPS[norm]
    settings = {"eps": eps, "steps": 10, "step_size": eps / 4, "queries": 200} | changes
    return Threat(norm=norm, **settings)


def attack(
    name: str,
    defence: Defence,
    images: torch.Tensor,
    labels: torch.Tensor,
    gradient: str = "exact",
    seeds: torch.Tensor | None = None,
    targets: TargetImages | None = None,
    **changes: Any,
) -> torch.Tensor:
    targets = targets or TargetImages.embed(defence, *toy_images(defence, 20))
    run = build(name, defence, gradient, threat(**changes), targets)
    return run(images, labels, torch.arange(len(images)) if seeds is None else seeds)
