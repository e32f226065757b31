"""Checks fail defences that only hide their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeclip.purify import CosPurifier
from tests.support.models.toy_models import toy, toy_images
from tests.support.robustness.checks import COUNT, Changed, check, measured
from train.robustness import checks
from train.robustness.checks import Trial
from train.robustness.defence import Defence, View


@pytest.fixture(scope="module")
def sound() -> Trial:
    return measured(toy())


class Masked(Defence):
    """Defence whose exact gradient is the released one."""

    def view(self, images: Tensor, gradient: str) -> View:
        return super().view(images, "released" if gradient == "exact" else gradient)


def quantised() -> Defence:
    return Changed(toy(), before=lambda images: (images * 16).round() / 16)


def detached() -> Defence:
    return Changed(toy(), before=lambda images: images.detach() + 0 * images)


def masked() -> Defence:
    defence = toy(purifier=CosPurifier(10, 30.0))
    return Masked(defence.model, defence.null_text, defence.purifier)


@pytest.mark.parametrize("make", [quantised, detached, masked])
def test_missing_gradients_fail(make: Callable[[], Defence]) -> None:
    trial = measured(make(), attacks=("cw",), gradients=("exact",))
    assert trial.robust.float().mean() > 0.9  # the figure without the checks
    names = ["gradient health", "falls at a large eps, never rises"]
    if make is not masked:  # in so few dimensions rounding errors attack a little
        names.append("beats noise")
    for name in names:
        finding = check(name, trial)
        assert finding.passed is False, (name, finding.figure)
    if make is not masked:
        assert "zero gradients 100.0 %" in check("gradient health", trial).figure
        trial = replace(trial, surrogate=toy())
    assert check("transfer is weaker", trial).passed is False


class ScaledGradient(torch.autograd.Function):
    """Identity with a scaled gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None]:
        return incoming[0] * ctx.saved_tensors[0], None


@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (2e-3, True), (5e-4, False), (0.0, False), (-1.0, False)]
)
def test_small_and_reversed_gradients_fail(sound: Trial, factor: float, passes: bool) -> None:
    defence = Changed(
        toy(), before=lambda images: ScaledGradient.apply(images, torch.tensor(factor))
    )
    finding = check("gradient health", replace(sound, defence=defence))
    assert finding.passed is passes, finding.figure


@pytest.mark.parametrize(("zeros", "passes"), [(1, True), (3, False)])
def test_gradients_that_are_zero_for_several_images_fail(
    sound: Trial, zeros: int, passes: bool
) -> None:
    def before(images: Tensor) -> Tensor:
        nowhere = (images[:, None] == sound.images[-zeros:]).flatten(2).all(2).any(1)
        return ScaledGradient.apply(images, (~nowhere).to(images)[:, None, None, None])

    finding = check("gradient health", replace(sound, defence=Changed(toy(), before=before)))
    assert finding.passed is passes, finding.figure


def test_gradients_of_another_function(sound: Trial) -> None:
    """Use a straight-through estimate: its gradient is large, but belongs to another function."""
    other = toy(seed=5)

    def before(images: Tensor) -> Tensor:
        turned = images.flip(3)
        return images.detach() + turned - turned.detach()

    finding = check("gradient health", replace(sound, defence=Changed(toy(), before=before)))
    assert finding.passed is False
    assert "zero gradients 0.0 %" in finding.figure
    assert check("gradient health", replace(sound, defence=other)).passed is not None


def test_gradients_of_misclassified_images_count(sound: Trial) -> None:
    assert check("gradient health", replace(sound, clean=~sound.clean)).passed is True


def refuge(inner: float, outer: float) -> Defence:
    """Defence that classifies images far from the clean ones (linf) as these."""
    defence = toy()
    clean, _ = toy_images(defence, COUNT)

    def before(images: Tensor) -> Tensor:
        apart = (images[:, None] - clean).abs().flatten(2).amax(2)
        size, nearest = apart.min(1)
        far = (size > inner) & (size < outer)
        return torch.where(far[:, None, None, None], clean[nearest], images)

    return Changed(defence, before=before)


def test_a_defence_that_resists_a_large_eps_fails() -> None:
    trial = measured(refuge(30 / 255, 2), attacks=("cw",))
    assert 0.2 < trial.robust.float().mean() < 0.8
    finding = check("falls at a large eps, never rises", trial)
    assert finding.passed is False
    assert "without purification at 80/255 0.0" in finding.figure


def test_a_defence_that_resists_a_larger_eps_better_fails() -> None:
    """Fail a defence that falls at the largest eps, but does better at a middle one than below it."""
    trial = measured(refuge(15 / 255, 21 / 255), attacks=("cw",))
    finding = check("falls at a large eps, never rises", trial)
    assert "80/255 0.0; " in finding.figure
    assert finding.passed is False, finding.figure


@pytest.mark.parametrize(
    ("accuracies", "count", "rises"),
    [
        ([0.9, 0.5, 0.5, 0.0], 1000, False),
        ([0.9, 0.501, 0.503, 0.0], 1000, False),
        ([0.9, 0.5, 0.503, 0.0], 1000, True),
        ([0.9, 0.5, 0.51], 100, False),
        ([0.9, 0.5, 0.52], 100, True),
        ([0.5], 1, False),
    ],
)
def test_rises_by_more_than_an_image_and_the_tolerance(
    accuracies: list[float], count: int, rises: bool
) -> None:
    assert checks._rises(accuracies, count) is rises


def test_an_attack_no_stronger_than_noise_fails(sound: Trial) -> None:
    assert check("beats noise", replace(sound, robust=sound.clean)).passed is False
    robust = sound.clean.clone()
    robust[0] = False  # 3 points
    assert check("beats noise", replace(sound, robust=robust)).passed is True
    nothing = torch.zeros_like(robust)
    assert check("beats noise", replace(sound, clean=nothing, robust=nothing)).passed is True


def test_noise_is_as_large_as_the_attack(sound: Trial) -> None:
    """Use noise that alone defeats a defence without a margin."""
    for norm, eps in (("linf", 0.5), ("l2", 12.0)):
        trial = replace(sound, threat=replace(sound.threat, norm=norm, eps=eps))
        floor = check("beats noise", trial).figure
        assert float(floor.split("starts ")[1].split(",")[0]) < 60
    queries = []

    class Recorder(Defence):
        def view(self, images: Tensor, gradient: str) -> View:
            queries.append(images)
            return super().view(images, gradient)

    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        threat = replace(sound.threat, norm=norm, eps=eps)
        recorder = Recorder(sound.defence.model, sound.defence.null_text)
        queries.clear()
        check("beats noise", replace(sound, defence=recorder, threat=threat))
        moved = (torch.cat(queries[:3]) - sound.images).flatten(1)
        size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        torch.testing.assert_close(size, torch.full_like(size, eps), rtol=1e-3, atol=0)
        starts = len(queries) // 3
        assert starts == 5
        assert not torch.equal(queries[0], queries[3])
