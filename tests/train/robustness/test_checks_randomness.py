"""Checks fail defences whose answers depend on more than the image."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.models.toy_models import toy, toy_images
from tests.support.robustness.checks import COUNT, Changed, check, measured, noisy
from train.robustness.checks import CHECKS, Trial
from train.robustness.defence import FixedNoise


@pytest.fixture(scope="module")
def sound() -> Trial:
    return measured(toy())


def test_answers_that_depend_on_the_batch_fail() -> None:
    defence = Changed(toy(), after=lambda logits: logits - logits.mean(0))
    assert check("batch invariance", measured(defence)).passed is False


def test_answers_that_depend_on_the_order_fail(sound: Trial) -> None:
    def after(logits: Tensor) -> Tensor:
        return logits + 0.01 * torch.arange(len(logits))[:, None]

    assert check(
        "batch invariance", replace(sound, defence=Changed(toy(), after=after))
    ).passed is (False)


@pytest.mark.parametrize(("size", "passes"), [(5e-5, True), (5e-4, False)])
def test_batches_differ_by_rounding_only(sound: Trial, size: float, passes: bool) -> None:
    """Compare cosines, which do not depend on the scale of the logits."""
    defence = Changed(toy(), after=lambda logits: logits + 20 * size * (len(logits) == COUNT - 1))
    assert check("batch invariance", replace(sound, defence=defence)).passed is passes


def test_one_image_is_a_batch(sound: Trial) -> None:
    one = replace(
        sound,
        **{
            name: getattr(sound, name)[:1]
            for name in ("images", "labels", "seeds", "clean", "robust", "before_square")
        },
    )
    for name in CHECKS:
        check(name, one)


def test_random_answers_measured_as_deterministic_fail() -> None:
    trial = measured(noisy(0.02), attacks=("cw",), count=9, steps=3)
    finding = check("randomness", trial)
    assert finding.passed is False
    assert "measured" in finding.figure
    assert "1 draws per step" in finding.figure


def test_random_answers_measured_with_enough_draws_pass() -> None:
    """Measure with 20 draws a figure that resubmission and known noise do not lower."""
    torch.manual_seed(0)
    trial = measured(noisy(1e-4), attacks=("cw",), count=9, eot=20, steps=3)
    assert trial.robust.any()
    finding = check("randomness", trial)
    assert finding.passed is True, finding.figure
    assert check("randomness", replace(trial, robust=trial.clean)).passed is False  # too good


def test_deterministic_answers_pass(sound: Trial) -> None:
    finding = check("randomness", sound)
    assert finding == (True, "the same answer twice, to the last bit")


def test_known_noise_is_the_same_each_time() -> None:
    defence = noisy(0.05)
    images, _ = toy_images(defence, 5)
    fixed, other = FixedNoise(defence, 3), FixedNoise(defence, 4)
    state = torch.get_rng_state()
    first = fixed(images)
    assert torch.equal(fixed(images), first)
    assert not torch.equal(other(images), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(defence(images), defence(images))


def test_known_noise_is_the_same_in_any_batch() -> None:
    """Use equal noise in the attack and the evaluation, for any batch."""
    defence = noisy(0.05)
    images, _ = toy_images(defence, 5)
    fixed = FixedNoise(defence, 3)
    whole = fixed(images)
    torch.testing.assert_close(fixed(images[2:3]), whole[2:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed(images[[4, 1]]), whole[[4, 1]], rtol=0, atol=1e-5)
