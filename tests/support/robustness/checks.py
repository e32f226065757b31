"""Measurements for the checks of train.robustness.checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgeclip.purify import CosPurifier
from tests.support.models.toy_models import toy, toy_images
from train.robustness.checks import CHECKS, Finding, Trial
from train.robustness.defence import Defence, View, correct
from train.robustness.threat import TargetImages, Threat, build

EPS = {"linf": 10 / 255, "l2": 0.6}
GENTLE = CosPurifier(3, 0.01)
COUNT = 33


def measured(
    defence: Defence,
    *,
    norm: str = "linf",
    attacks: tuple[str, ...] = ("cw", "feature"),
    gradients: tuple[str, ...] = ("exact", "encoder"),
    count: int = COUNT,
    **changes: Any,
) -> Trial:
    """Measure a defence under the attacks, in few steps."""
    images, labels = toy_images(defence, count)
    seeds, eps = torch.arange(count), EPS[norm]
    settings = {"eps": eps, "steps": 8, "step_size": eps / 4, "queries": 30} | changes
    threat, targets = Threat(norm, **settings), TargetImages.embed(defence, images, labels)
    clean = robust = correct(defence, images, labels)
    for attack in attacks:
        for gradient in gradients if defence.purifier else gradients[:1]:
            attacked = build(attack, defence, gradient, threat, targets)(images, labels, seeds)
            robust = robust & correct(defence, attacked, labels)
    return Trial(
        defence, threat, images, labels, seeds, clean=clean, robust=robust, before_square=robust,
        square=None, targets=targets, batch_size=16,
    )  # fmt: skip


def check(name: str, trial: Trial) -> Finding:
    finding = CHECKS[name](trial)
    assert finding.figure
    assert finding.passed in (True, False, None)
    return finding


class Changed(Defence):
    """Another defence, with changed images or logits."""

    def __init__(
        self,
        defence: Defence,
        before: Callable[[Tensor], Tensor] = lambda images: images,
        after: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__(defence.model, defence.null_text, defence.purifier)
        self.before, self.after = before, after

    def view(self, images: Tensor, gradient: str) -> View:
        view = super().view(self.before(images), gradient)
        logits = self.after(view.logits)
        return View(logits, view.embedding, logits if gradient != "encoder" else view.answer)


def noisy(size: float) -> Defence:
    return Changed(toy(), before=lambda images: images + size * torch.randn_like(images))
