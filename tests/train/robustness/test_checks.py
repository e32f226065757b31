"""Checks pass a sound measurement, and fail one whose marks are too good."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edgeclip.purify import CosPurifier
from tests.support.models.toy_models import toy
from tests.support.robustness.checks import COUNT, GENTLE, check, measured
from train.robustness import checks
from train.robustness.checks import CHECKS, Trial
from train.robustness.defence import Defence
from train.robustness.threat import TargetImages, Threat


def test_there_are_ten() -> None:
    assert len(CHECKS) == 10


@pytest.fixture(scope="module")
def sound() -> Trial:
    return measured(toy())


def test_sound_trial_is_worth_checking(sound: Trial) -> None:
    assert sound.clean.all()
    assert 0.2 < sound.robust.float().mean() < 0.8


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sound_measurements_pass(sound: Trial, norm: str, name: str) -> None:
    trial = sound if norm == "linf" else measured(toy(), norm=norm)
    trial = replace(
        trial,
        surrogate=toy(),
        exported={"fp32": lambda images: trial.defence(images).argmax(1)},
    )
    finding = check(name, trial)
    assert finding.passed is (None if name == "step parity" else True), finding.figure


@pytest.mark.parametrize("name", CHECKS)
def test_sound_measurements_of_a_gentle_purification_pass(name: str) -> None:
    finding = check(name, measured(toy(purifier=GENTLE)))
    assert finding.passed is (None if name == "exported precisions" else True), finding.figure


def test_checks_that_do_not_apply_neither_pass_nor_fail(sound: Trial) -> None:
    for name in ("transfer is weaker", "step parity", "exported precisions"):
        assert check(name, sound).passed is None


def test_published_steps_reverse_figures() -> None:
    trial = measured(toy(purifier=CosPurifier(10, 30.0)), steps=4)
    assert trial.clean.all()
    finding = check("step parity", trial)
    assert finding.passed is False
    assert "after 9, 10, 11 steps of size 0.1: " in finding.figure
    at_30 = finding.figure.split("30: ")[1]
    assert at_30.startswith("0/0, 100/")
    assert at_30.endswith(", 0/0")
    assert trial.defence.purifier == CosPurifier(10, 30.0)


@pytest.mark.parametrize("purifier", [GENTLE, CosPurifier(0, 0.01), CosPurifier(1, 0.005)], ids=str)
def test_gentle_steps_keep_figures(purifier: CosPurifier) -> None:
    finding = check("step parity", measured(toy(purifier=purifier), steps=4))
    assert finding.passed is True, finding.figure
    assert f"{purifier.step_size:g}: " in finding.figure


def test_exported_precisions_with_other_answers_fail(sound: Trial) -> None:
    def exact(images: Tensor) -> Tensor:
        return sound.defence(images).argmax(1)

    def off(images: Tensor) -> Tensor:
        return (exact(images) + 1) % 5

    def harder(images: Tensor) -> Tensor:
        """Return the classes of a graph that undoes the attack."""
        return sound.labels[: len(images)] if len(images) == COUNT else exact(images)

    def one_off(images: Tensor) -> Tensor:
        """Return other classes for one image in 33, which is 3 points."""
        answers, right_now = exact(images), exact(images) == sound.labels
        answers[right_now.nonzero()[0]] += 1
        return answers % 5

    for wrong in (off, harder, one_off):
        finding = check(
            "exported precisions", replace(sound, exported={"fp32": exact, "int8": wrong})
        )
        assert finding.passed is False, finding.figure
        assert "int8" in finding.figure
        finding = check("exported precisions", replace(sound, exported={"fp32": exact}))
        assert finding.passed is True


@pytest.mark.parametrize("name", ["transfer is weaker", "feature matching is weaker"])
def test_marks_that_other_attacks_contradict_fail(name: str) -> None:
    for defence in (toy(purifier=GENTLE), toy()):
        trial = replace(measured(defence, attacks=("cw",)), surrogate=toy())
        optimistic = replace(trial, robust=trial.clean)
        assert check(name, optimistic).passed is False
        assert check(name, trial).passed is True


def test_another_models_attack_that_is_stronger(sound: Trial) -> None:
    robust = sound.robust.clone()
    robust[(~robust).nonzero()[:2]] = True
    assert check("transfer is weaker", replace(sound, surrogate=toy())).passed is True
    trial = replace(sound, surrogate=toy(), robust=robust)
    finding = check("transfer is weaker", trial)
    assert finding.passed is False
    assert "from another model" in finding.figure
    assert check("transfer is weaker", replace(trial, surrogate=toy(seed=9))).passed is True


def test_square_that_is_stronger(sound: Trial) -> None:
    stronger = sound.robust.clone()
    stronger[sound.robust.nonzero()[0]] = False
    for marks, passes in ((sound.clean, True), (sound.robust, True), (stronger, False)):
        trial = replace(sound, square=marks, robust=sound.robust & marks)
        assert check("square is weaker", trial).passed is passes
    # The check runs Square if the measurement did not.
    big = replace(sound.threat, eps=60 / 255, queries=300)
    trial = replace(sound, threat=big, before_square=sound.clean)
    finding = check("square is weaker", trial)
    assert finding.passed is False, finding.figure
    assert "300 queries" in finding.figure
    trial = replace(trial, before_square=~sound.clean)
    assert check("square is weaker", trial).passed is True


def test_misclassified_images_are_not_attacked(sound: Trial) -> None:
    clean = sound.clean.clone()
    clean[[0, 5, 17, 32]] = False
    trial = replace(sound, clean=clean)
    attacked = trial.attack("pgd")
    moved = (attacked != trial.images).flatten(1).any(1)
    assert torch.equal(moved, clean)
    assert not (trial.still_correct(trial.images) & ~clean).any()
    none = replace(trial, clean=torch.zeros_like(clean))
    assert torch.equal(none.attack("cw"), none.images)
    assert not none.still_correct(none.images).any()


def test_batch_size_does_not_change_the_attack(sound: Trial) -> None:
    attacked = [replace(sound, batch_size=size).attack("cw", steps=3) for size in (1, 10, 100)]
    for other in attacked[1:]:
        torch.testing.assert_close(other, attacked[0], rtol=0, atol=1e-6)


def test_another_eps_scales_the_step_size(sound: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    threats: list[Threat] = []

    def build(name: str, defence: Defence, gradient: str, threat: Threat, targets: TargetImages):  # type: ignore[no-untyped-def]
        threats.append(threat)
        return lambda images, labels, seeds: images

    monkeypatch.setattr(checks, "build", build)
    sound.attack("cw")
    sound.attack("cw", eps=0.2)
    sound.attack("cw", steps=3)
    sound.attack("cw", step_size=0.07)
    base = sound.threat
    assert threats == [
        base, replace(base, eps=0.2, step_size=0.05), replace(base, steps=3), replace(base, step_size=0.07)
    ]  # fmt: skip
