"""Attacks on CLIPure-Diff that do not know its seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from edgeclip.purify import CosPurifier, DiffPurifier
from tests.support.models.toy_models import null_prior, toy, toy_images
from tests.support.robustness.threats import attack, threat
from train.robustness.defence import Defence, UnknownSeed, correct
from train.robustness.result_file import GRADIENTS
from train.robustness.threat import ATTACKS, TargetImages, build

UNSURE = DiffPurifier(2, 0.1, (0, 999), 5)


def diff_toy(purifier: DiffPurifier = UNSURE, prior: torch.nn.Module | None = None) -> Defence:
    cos_toy = toy(purifier=purifier)
    prior = prior or null_prior(6).float()
    return Defence(cos_toy.model, cos_toy.null_text, purifier, prior).eval()


def with_seed(defence: Defence, seed: int) -> Defence:
    return diff_toy(replace(defence.purifier, seed=seed), defence.prior)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_answers_use_the_true_seed_and_gradients_guessed_seeds(mode: str) -> None:
    defence = diff_toy()
    images, _ = toy_images(defence, 5)
    unknown = UnknownSeed(defence, 9)
    draws = random.Random(9)
    for _ in range(3):
        other = with_seed(defence, draws.randint(0, 2**32 - 1))
        leaves = images.clone().requires_grad_()
        view = unknown.view(leaves, mode)
        mirrored = images.clone().requires_grad_()
        expected = other.view(mirrored, mode)
        assert torch.equal(view.answer, defence(images))
        assert not view.answer.requires_grad
        assert torch.equal(view.logits, expected.logits)
        assert torch.equal(view.embedding, expected.embedding)
        slopes = [
            torch.autograd.grad(x.logits[:, 0].sum(), y)[0]
            for x, y in ((view, leaves), (expected, mirrored))
        ]
        assert torch.equal(*slopes)
        if mode != "encoder":  # the encoder's answer has no seed
            assert not torch.allclose(view.logits, view.answer, rtol=1e-4)
    assert defence.purifier == UNSURE


def test_unknown_seed_restarts() -> None:
    defence = diff_toy()
    images, _ = toy_images(defence, 3)
    unknown = UnknownSeed(defence, 9)
    first = [unknown.view(images, "exact").logits for _ in range(3)]
    assert not torch.equal(first[0], first[1])
    unknown.restart()
    again = [unknown.view(images, "exact").logits for _ in range(3)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = UnknownSeed(defence, 10).view(images, "exact").logits
    assert not torch.equal(first[0], other)


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> list[UnknownSeed]:
    """Collect the instances made while the test runs."""
    instances: list[UnknownSeed] = []

    class Recorded(UnknownSeed):
        def __init__(self, defence: Defence, seed: int) -> None:
            super().__init__(defence, seed)
            instances.append(self)

    monkeypatch.setattr("train.robustness.threat.UnknownSeed", Recorded)
    return instances


def test_seed_is_guessed_where_draws_are_averaged(guesses: list[UnknownSeed]) -> None:
    defence = diff_toy()
    targets = TargetImages.embed(defence, *toy_images(defence, 20))
    for name in ATTACKS:
        build(name, defence, "exact", threat(eot=1), targets)
        build(name, toy(purifier=CosPurifier(3, 0.02)), "exact", threat(eot=3), targets)
    assert guesses == []
    for name in ATTACKS:
        build(name, defence, "exact", threat(eot=3, seed=7), targets)
    assert len(guesses) == len(ATTACKS) - 1  # square uses no gradients
    assert {guess.seed for guess in guesses} == {7}


@pytest.mark.parametrize("name", ["pgd", "cw", "feature", "apgd-ce"])
def test_earlier_attacks_do_not_matter(name: str) -> None:
    defence = diff_toy()
    images, labels = toy_images(defence, 6)
    targets = TargetImages.embed(defence, *toy_images(defence, 20))
    run = build(name, defence, "exact", threat("l2", eot=2, steps=3), targets)
    seeds = torch.arange(6)
    first = run(images, labels, seeds)
    run(images[:3] * 0.9, labels[:3], seeds[:3])
    assert torch.equal(run(images, labels, seeds), first)
    known = build(name, defence, "exact", threat("l2", steps=3), targets)(images, labels, seeds)
    assert not torch.equal(known, first)


class SeedBound(torch.nn.Module):
    """Prior that leaves the answers of the true seed unchanged, and reverses those of all others."""

    def __init__(self, purifier: DiffPurifier) -> None:
        super().__init__()
        self.noise = torch.from_numpy(purifier.draws(6)[1][0])

    def gradient(self, unit: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
        if torch.equal(noise, self.noise):
            return 0 * unit
        return unit - unit.mean(dim=1, keepdim=True)  # away from every class


@pytest.mark.parametrize("name", ["pgd", "cw", "apgd-ce", "apgd-t", "fab-t"])
def test_images_misclassified_under_a_guessed_seed_are_attacked(name: str) -> None:
    """Attack by the answer of the true seed, whatever the library sees by other seeds."""
    purifier = DiffPurifier(1, 30.0, (0, 999), 5)
    defence = diff_toy(purifier, SeedBound(purifier))
    images, labels = toy_images(defence, 9)
    assert correct(defence, images, labels).all()
    wrong = ~correct(with_seed(defence, 6), images, labels)
    assert wrong.float().mean() > 0.5
    attacked = attack(name, defence, images, labels, eot=2, steps=4)
    moved = (attacked != images).flatten(1).any(1)
    assert moved[wrong].all()
