"""Checks pass a sound measurement, and fail defences that only seem robust."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeclip.purify import MAX_SEED, CosPurifier, DiffPurifier
from tests.support.toy_models import null_prior, toy, toy_images
from train.robustness import checks
from train.robustness.checks import CHECKS, Finding, Trial
from train.robustness.defence import Defence, FixedNoise, View, correct
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
    """Measure a defence by few attacks."""
    images, labels = toy_images(defence, count)
    seeds, eps = torch.arange(count), EPS[norm]
    given = {"eps": eps, "steps": 8, "step_size": eps / 4, "queries": 30} | changes
    threat, targets = Threat(norm, **given), TargetImages.embed(defence, images, labels)
    clean = robust = correct(defence, images, labels)
    for attack in attacks:
        for gradient in gradients if defence.purifier else gradients[:1]:
            found = build(attack, defence, gradient, threat, targets)(images, labels, seeds)
            robust = robust & correct(defence, found, labels)
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
        seen = super().view(self.before(images), gradient)
        logits = self.after(seen.logits)
        return View(logits, seen.embedding, logits if gradient != "encoder" else seen.answer)


class Masked(Defence):
    """Defence whose exact gradient is the released one."""

    def view(self, images: Tensor, gradient: str) -> View:
        return super().view(images, "released" if gradient == "exact" else gradient)


def quantised() -> Defence:
    return Changed(toy(), before=lambda images: (images * 16).round() / 16)


def detached() -> Defence:
    return Changed(toy(), before=lambda images: images.detach() + 0 * images)


def masked() -> Defence:
    plain = toy(purifier=CosPurifier(10, 30.0))
    return Masked(plain.model, plain.null_text, plain.purifier)


def noisy(size: float) -> Defence:
    return Changed(toy(), before=lambda images: images + size * torch.randn_like(images))


def test_there_are_ten() -> None:
    assert len(CHECKS) == 10


# A sound measurement.


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


def test_what_does_not_apply_is_neither(sound: Trial) -> None:
    for name in ("transfer is weaker", "step parity", "exported precisions"):
        assert check(name, sound).passed is None


# Defences that only seem to be some.


@pytest.mark.parametrize("make", [quantised, detached, masked])
def test_gradients_that_are_not_there(make: Callable[[], Defence]) -> None:
    trial = measured(make(), attacks=("cw",), gradients=("exact",))
    assert trial.robust.float().mean() > 0.9  # what is believed without the checks
    names = ["gradient health", "falls at a large eps, never rises"]
    if make is not masked:  # in so few dimensions what rounding leaves does a little
        names.append("beats noise")
    for name in names:
        finding = check(name, trial)
        assert finding.passed is False, (name, finding.figure)
    if make is not masked:
        assert "zero gradients 100.0 %" in check("gradient health", trial).figure
        trial = replace(trial, surrogate=toy())
    assert check("transfer is weaker", trial).passed is False


class Fewer(torch.autograd.Function):
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
def test_gradients_that_are_small_or_point_elsewhere(
    sound: Trial, factor: float, passes: bool
) -> None:
    defence = Changed(toy(), before=lambda images: Fewer.apply(images, torch.tensor(factor)))
    finding = check("gradient health", replace(sound, defence=defence))
    assert finding.passed is passes, finding.figure


@pytest.mark.parametrize(("zeros", "passes"), [(1, True), (3, False)])
def test_gradients_that_are_zero_for_some(sound: Trial, zeros: int, passes: bool) -> None:
    def before(images: Tensor) -> Tensor:
        nowhere = (images[:, None] == sound.images[-zeros:]).flatten(2).all(2).any(1)
        return Fewer.apply(images, (~nowhere).to(images)[:, None, None, None])

    finding = check("gradient health", replace(sound, defence=Changed(toy(), before=before)))
    assert finding.passed is passes, finding.figure


def test_gradients_of_another_function(sound: Trial) -> None:
    """Use a straight-through estimate: its gradient is large, but not of the evaluated function."""
    other = toy(seed=5)

    def before(images: Tensor) -> Tensor:
        turned = images.flip(3)
        return images.detach() + turned - turned.detach()

    finding = check("gradient health", replace(sound, defence=Changed(toy(), before=before)))
    assert finding.passed is False
    assert "zero gradients 0.0 %" in finding.figure
    assert check("gradient health", replace(sound, defence=other)).passed is not None


def test_gradients_are_looked_at_whatever_is_right(sound: Trial) -> None:
    assert check("gradient health", replace(sound, clean=~sound.clean)).passed is True


def refuge(inner: float, outer: float) -> Defence:
    """Defence that classifies images far from the clean ones (linf) as these."""
    plain = toy()
    clean, _ = toy_images(plain, COUNT)

    def before(images: Tensor) -> Tensor:
        apart = (images[:, None] - clean).abs().flatten(2).amax(2)
        size, nearest = apart.min(1)
        far = (size > inner) & (size < outer)
        return torch.where(far[:, None, None, None], clean[nearest], images)

    return Changed(plain, before=before)


def test_what_resists_a_large_eps() -> None:
    trial = measured(refuge(30 / 255, 2), attacks=("cw",))
    assert 0.2 < trial.robust.float().mean() < 0.8
    finding = check("falls at a large eps, never rises", trial)
    assert finding.passed is False
    assert "without purification at 80/255 0.0" in finding.figure


def test_what_resists_a_larger_eps_better() -> None:
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


def test_an_attack_that_does_no_more_than_noise(sound: Trial) -> None:
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
    seen = []

    class Recorder(Defence):
        def view(self, images: Tensor, gradient: str) -> View:
            seen.append(images)
            return super().view(images, gradient)

    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        threat = replace(sound.threat, norm=norm, eps=eps)
        recorder = Recorder(sound.defence.model, sound.defence.null_text)
        seen.clear()
        check("beats noise", replace(sound, defence=recorder, threat=threat))
        moved = (torch.cat(seen[:3]) - sound.images).flatten(1)
        size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        torch.testing.assert_close(size, torch.full_like(size, eps), rtol=1e-3, atol=0)
        starts = len(seen) // 3
        assert starts == 5
        assert not torch.equal(seen[0], seen[3])


# Answers that depend on more than the image.


def test_answers_that_depend_on_the_batch() -> None:
    defence = Changed(toy(), after=lambda logits: logits - logits.mean(0))
    assert check("batch invariance", measured(defence)).passed is False


def test_answers_that_depend_on_the_order(sound: Trial) -> None:
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


def test_random_answers_measured_as_if_they_were_not() -> None:
    trial = measured(noisy(0.02), attacks=("cw",), count=9, steps=3)
    finding = check("randomness", trial)
    assert finding.passed is False
    assert "measured" in finding.figure
    assert "1 draws per step" in finding.figure


def test_random_answers_measured_as_they_should() -> None:
    """Measure with 20 draws a figure that resubmission and known noise do not lower."""
    torch.manual_seed(0)
    trial = measured(noisy(1e-4), attacks=("cw",), count=9, eot=20, steps=3)
    assert trial.robust.any()
    finding = check("randomness", trial)
    assert finding.passed is True, finding.figure
    assert check("randomness", replace(trial, robust=trial.clean)).passed is False  # too good


def test_answers_that_are_not_random(sound: Trial) -> None:
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
    """Attack and evaluate with equal noise, whatever the batch."""
    defence = noisy(0.05)
    images, _ = toy_images(defence, 5)
    fixed = FixedNoise(defence, 3)
    whole = fixed(images)
    torch.testing.assert_close(fixed(images[2:3]), whole[2:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(fixed(images[[4, 1]]), whole[[4, 1]], rtol=0, atol=1e-5)


# Settings and files that answer otherwise.


def test_published_steps_turn_figures_over() -> None:
    trial = measured(toy(purifier=CosPurifier(10, 30.0)), steps=4)
    assert trial.clean.all()
    finding = check("step parity", trial)
    assert finding.passed is False
    assert "after 9, 10, 11 steps of size 0.1: " in finding.figure
    own = finding.figure.split("30: ")[1]
    assert own.startswith("0/0, 100/")
    assert own.endswith(", 0/0")
    assert trial.defence.purifier == CosPurifier(10, 30.0)


@pytest.mark.parametrize("purifier", [GENTLE, CosPurifier(0, 0.01), CosPurifier(1, 0.005)], ids=str)
def test_gentle_steps_do_not(purifier: CosPurifier) -> None:
    finding = check("step parity", measured(toy(purifier=purifier), steps=4))
    assert finding.passed is True, finding.figure
    assert f"{purifier.step_size:g}: " in finding.figure


def test_exported_precisions_that_answer_otherwise(sound: Trial) -> None:
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


# Marks that are too good.


@pytest.mark.parametrize("name", ["transfer is weaker", "feature matching is weaker"])
def test_marks_that_other_attacks_do_not_bear_out(name: str) -> None:
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
    # Where the measurement did without it, the check runs it.
    big = replace(sound.threat, eps=60 / 255, queries=300)
    trial = replace(sound, threat=big, before_square=sound.clean)
    finding = check("square is weaker", trial)
    assert finding.passed is False, finding.figure
    assert "300 queries" in finding.figure
    trial = replace(trial, before_square=~sound.clean)
    assert check("square is weaker", trial).passed is True


# What the checks attack.


def test_what_was_wrong_is_not_attacked(sound: Trial) -> None:
    clean = sound.clean.clone()
    clean[[0, 5, 17, 32]] = False
    trial = replace(sound, clean=clean)
    found = trial.attack("pgd")
    moved = (found != trial.images).flatten(1).any(1)
    assert torch.equal(moved, clean)
    assert not (trial.still_correct(trial.images) & ~clean).any()
    none = replace(trial, clean=torch.zeros_like(clean))
    assert torch.equal(none.attack("cw"), none.images)
    assert not none.still_correct(none.images).any()


def test_batches_do_not_change_what_is_found(sound: Trial) -> None:
    found = [replace(sound, batch_size=size).attack("cw", steps=3) for size in (1, 10, 100)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_another_eps_has_steps_of_its_own(sound: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Threat] = []

    def build(name: str, defence: Defence, gradient: str, threat: Threat, targets: TargetImages):  # type: ignore[no-untyped-def]
        seen.append(threat)
        return lambda images, labels, seeds: images

    monkeypatch.setattr(checks, "build", build)
    sound.attack("cw")
    sound.attack("cw", eps=0.2)
    sound.attack("cw", steps=3)
    sound.attack("cw", step_size=0.07)
    own = sound.threat
    assert seen == [
        own, replace(own, eps=0.2, step_size=0.05), replace(own, steps=3), replace(own, step_size=0.07)
    ]  # fmt: skip


# CLIPure-Diff.


@pytest.fixture(scope="module")
def climbing() -> Trial:
    purifier = DiffPurifier(2, 0.05, (0, 999), 5)
    plain = toy(purifier=purifier)
    defence = Defence(plain.model, plain.null_text, purifier, null_prior(6).float()).eval()
    return measured(defence, count=9, steps=3, attacks=("cw",))


def test_seeds_that_are_known_guessed_and_drawn_again(climbing: Trial) -> None:
    finding = check("randomness", climbing)
    assert finding.passed is True, finding.figure
    for told in ("the seed known", "EOT with 20 draws of it", "by 10 other seeds in turn"):
        assert told in finding.figure
    robust = 100 * climbing.robust.float().mean().item()
    assert f"under all attacks {robust:.1f}" in finding.figure


def test_attack_that_did_not_know_the_seed(climbing: Trial) -> None:
    trial = replace(climbing, robust=climbing.clean, threat=replace(climbing.threat, eps=40 / 255))
    assert check("randomness", trial).passed is False


def test_diff_that_answers_at_random(climbing: Trial) -> None:
    class Noisy(Defence):
        def view(self, images: Tensor, gradient: str) -> View:
            return super().view(images + 1e-3 * torch.randn_like(images), gradient)

    own = climbing.defence
    noisy = Noisy(own.model, own.null_text, own.purifier, own.prior).eval()
    assert check("randomness", replace(climbing, defence=noisy)).passed is False


def test_last_seed_has_others_after_it(climbing: Trial) -> None:
    own = climbing.defence
    last = replace(own.purifier, seed=MAX_SEED)
    defence = Defence(own.model, own.null_text, last, own.prior).eval()
    check(
        "randomness", replace(climbing, defence=defence, threat=replace(climbing.threat, steps=1))
    )


def test_step_parity_of_diff(climbing: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    with_ = checks._with
    monkeypatch.setattr(checks, "_with", lambda t, p: (seen.append(p), with_(t, p))[1])
    trial = replace(climbing, threat=replace(climbing.threat, steps=1))
    finding = check("step parity", trial)
    own = climbing.defence.purifier
    wanted = [
        replace(own, steps=steps, step_size=size)
        for size in (0.05, 0.1, 1.0, 10.0, 30.0)
        for steps in (1, 2, 3)
    ]
    assert seen == wanted
    assert "after 1, 2, 3 steps of size 0.05: " in finding.figure
    assert climbing.defence.purifier == own


@pytest.mark.parametrize(
    "name", ["gradient health", "batch invariance", "feature matching is weaker"]
)
def test_sound_measurements_of_diff_pass(climbing: Trial, name: str) -> None:
    finding = check(name, climbing)
    assert finding.passed is True, finding.figure


@pytest.mark.parametrize("eot", [1, 2])
def test_transfer_to_diff_is_by_the_other_models_gradient(climbing: Trial, eot: int) -> None:
    """Use the other model's gradient, for any number of draws."""

    class Asked(Defence):
        count = 0

        def view(self, images: Tensor, gradient: str) -> View:
            self.count += torch.is_grad_enabled()
            return super().view(images, gradient)

    other = Asked(toy(seed=9).model, climbing.defence.null_text).eval()
    threat = replace(climbing.threat, steps=2, eot=eot)
    finding = check("transfer is weaker", replace(climbing, surrogate=other, threat=threat))
    assert "from another model" in finding.figure
    assert other.count > 0
