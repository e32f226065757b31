"""Checks of CLIPure-Diff."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeclip.purify import MAX_SEED, DiffPurifier
from tests.support.models.toy_models import null_prior, toy
from tests.support.robustness.checks import check, measured
from train.robustness import checks
from train.robustness.checks import Trial
from train.robustness.defence import Defence, View


@pytest.fixture(scope="module")
def diff_trial() -> Trial:
    purifier = DiffPurifier(2, 0.05, (0, 999), 5)
    cos_toy = toy(purifier=purifier)
    defence = Defence(cos_toy.model, cos_toy.null_text, purifier, null_prior(6).float()).eval()
    return measured(defence, count=9, steps=3, attacks=("cw",))


def test_known_guessed_and_redrawn_seeds(diff_trial: Trial) -> None:
    finding = check("randomness", diff_trial)
    assert finding.passed is True, finding.figure
    for part in ("the seed known", "EOT with 20 draws of it", "by 10 other seeds in turn"):
        assert part in finding.figure
    robust = 100 * diff_trial.robust.float().mean().item()
    assert f"under all attacks {robust:.1f}" in finding.figure


def test_attack_that_did_not_know_the_seed_fails(diff_trial: Trial) -> None:
    trial = replace(
        diff_trial, robust=diff_trial.clean, threat=replace(diff_trial.threat, eps=40 / 255)
    )
    assert check("randomness", trial).passed is False


def test_diff_with_random_answers_fails(diff_trial: Trial) -> None:
    class Noisy(Defence):
        def view(self, images: Tensor, gradient: str) -> View:
            return super().view(images + 1e-3 * torch.randn_like(images), gradient)

    defence = diff_trial.defence
    noisy = Noisy(defence.model, defence.null_text, defence.purifier, defence.prior).eval()
    assert check("randomness", replace(diff_trial, defence=noisy)).passed is False


def test_largest_seed_has_successors(diff_trial: Trial) -> None:
    defence = diff_trial.defence
    last = replace(defence.purifier, seed=MAX_SEED)
    defence = Defence(defence.model, defence.null_text, last, defence.prior).eval()
    check(
        "randomness",
        replace(diff_trial, defence=defence, threat=replace(diff_trial.threat, steps=1)),
    )


def test_step_parity_of_diff(diff_trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    purifiers: list[Any] = []
    with_purifier = checks._with
    monkeypatch.setattr(checks, "_with", lambda t, p: (purifiers.append(p), with_purifier(t, p))[1])
    trial = replace(diff_trial, threat=replace(diff_trial.threat, steps=1))
    finding = check("step parity", trial)
    purifier = diff_trial.defence.purifier
    expected = [
        replace(purifier, steps=steps, step_size=size)
        for size in (0.05, 0.1, 1.0, 10.0, 30.0)
        for steps in (1, 2, 3)
    ]
    assert purifiers == expected
    assert "after 1, 2, 3 steps of size 0.05: " in finding.figure
    assert diff_trial.defence.purifier == purifier


@pytest.mark.parametrize(
    "name", ["gradient health", "batch invariance", "feature matching is weaker"]
)
def test_sound_measurements_of_diff_pass(diff_trial: Trial, name: str) -> None:
    finding = check(name, diff_trial)
    assert finding.passed is True, finding.figure


@pytest.mark.parametrize("eot", [1, 2])
def test_transfer_to_diff_is_by_the_other_models_gradient(diff_trial: Trial, eot: int) -> None:
    """Use the other model's gradient, for any number of draws."""

    class Counted(Defence):
        count = 0

        def view(self, images: Tensor, gradient: str) -> View:
            self.count += torch.is_grad_enabled()
            return super().view(images, gradient)

    other = Counted(toy(seed=9).model, diff_trial.defence.null_text).eval()
    threat = replace(diff_trial.threat, steps=2, eot=eot)
    finding = check("transfer is weaker", replace(diff_trial, surrogate=other, threat=threat))
    assert "from another model" in finding.figure
    assert other.count > 0
