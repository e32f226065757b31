"""Attacks by name: their threat, their published settings, and the gradient they use."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchattacks

from edgeclip.purify import CosPurifier, DiffPurifier
from tests.support.toy_models import null_prior, toy, toy_images
from train.errors import SettingsError
from train.robustness.defence import Defence, UnknownSeed, correct
from train.robustness.result_file import GRADIENTS
from train.robustness.threat import ATTACKS, AUTOATTACK, Stage, TargetImages, Threat, build, plan

OURS = ("pgd", "cw", "feature")
EPS = {"linf": 8 / 255, "l2": 0.4}


def threat(norm: str = "linf", **changes: Any) -> Threat:
    eps = EPS[norm]
    given = {"eps": eps, "steps": 10, "step_size": eps / 4, "queries": 200} | changes
    return Threat(norm=norm, **given)


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


@pytest.mark.parametrize("edges", [False, True], ids=["", "at the edges of [0, 1]"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_stays_within_eps_and_the_range(name: str, norm: str, edges: bool) -> None:
    defence = toy(purifier=CosPurifier(3, 0.02))
    images, labels = toy_images(defence, 9, 2 / 255)
    eps = EPS[norm]
    if edges:
        images, eps = (images > 0.5).float(), 0.6 if norm == "linf" else 3.0
    changes = {"eps": eps, "step_size": eps / 3, "steps": 4, "queries": 60}
    for gradient in GRADIENTS if name in OURS else ("exact", "encoder"):
        found = attack(name, defence, images, labels, gradient, norm=norm, **changes)
        assert found.shape == images.shape
        assert found.dtype == images.dtype
        assert found.isfinite().all()
        assert found.min() >= 0
        assert found.max() <= 1
        moved = (found - images).flatten(1)
        size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        assert size.max() <= eps * (1 + 1e-5)
        assert size.max() > 0.5 * eps or (edges and name not in OURS)  # some is found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_finds_what_there_is_to_find(name: str, norm: str) -> None:
    """Attack images within easy reach; the images and weights themselves do not change."""
    defence = toy()
    images, labels = toy_images(defence, 10, 4 / 255, 6 / 255)
    kept, weights = images.clone(), [p.clone() for p in defence.parameters()]
    eps = 16 / 255 if norm == "linf" else 0.9
    more = {"eps": eps, "step_size": eps / 4, "queries": 1000}
    found = attack(name, defence, images, labels, norm=norm, **more)
    assert correct(defence, images, labels).all()
    left = correct(defence, found, labels).float().mean()
    assert left <= (0.2 if name == "square" else 0)
    assert torch.equal(images, kept)
    for parameter, weight in zip(defence.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is None or name == "fab-t"  # which the library takes by backward()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[torchattacks.attack.Attack]:
    """Record calls of the library's attacks instead of running them."""
    seen: list[torchattacks.attack.Attack] = []

    def call(self: torchattacks.attack.Attack, images: torch.Tensor, labels: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append(self)
        return images

    monkeypatch.setattr(torchattacks.attack.Attack, "__call__", call)
    return seen


@pytest.mark.parametrize(("norm", "shown"), [("linf", "Linf"), ("l2", "L2")])
def test_settings_are_those_of_autoattacks_standard_version(
    called: list[Any], norm: str, shown: str
) -> None:
    """Compare with Croce and Hein, ICML 2020: 100 steps or 5,000 queries each."""
    defence = toy(12)
    images, labels = toy_images(defence, 2)
    standard = Threat(norm=norm, eps=EPS[norm], steps=100, step_size=0.01, seed=7)
    assert (standard.restarts, standard.queries, standard.eot) == (1, 5000, 1)
    for name in AUTOATTACK:
        run = build(
            name, defence, "identity", standard, TargetImages.embed(defence, images, labels)
        )
        assert torch.equal(run(images, labels, labels), images)
    assert AUTOATTACK == ("apgd-ce", "apgd-t", "fab-t", "square")
    ce, targeted, fab, square = called
    classes = (torchattacks.APGD, torchattacks.APGDT, torchattacks.FAB, torchattacks.Square)
    for found, kind in zip(called, classes, strict=True):
        assert type(found) is kind
        assert (found.norm, found.eps, found.n_restarts, found.seed) == (shown, EPS[norm], 1, 7)
        assert found.model.defence is defence
        # Square is to ask the whole defence.
        assert found.model.gradient == ("exact" if found is square else "identity")
        assert not found.model.training
        assert not found.targeted
    for found in (ce, targeted):
        assert (found.steps, found.thr_decr, found.eot_iter) == (100, 0.75, 1)
    assert ce.loss == "ce"
    assert targeted.n_target_classes == 9
    assert (fab.steps, fab.alpha_max, fab.eta, fab.beta) == (100, 0.1, 1.05, 0.9)
    assert (fab.multi_targeted, fab.n_target_classes) == (True, 9)
    assert (square.n_queries, square.p_init, square.loss) == (5000, 0.8, "margin")
    assert not square.rescale_schedule
    schedule = {0: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 4999: 128}
    for query, share in schedule.items():
        assert square.p_selection(query) == 0.8 / share


def test_a_threats_settings_reach_the_library(called: list[Any]) -> None:
    defence = toy(4)
    images, labels = toy_images(defence, 4)
    given = {"steps": 7, "restarts": 3, "queries": 33, "eot": 5, "seed": 11, "eps": 0.1}
    for name in AUTOATTACK:
        attack(name, defence, images, labels, "released", **given)
    for found in called:
        assert (found.eps, found.n_restarts, found.seed) == (0.1, 3, 11)
        assert found.model.gradient == ("exact" if found is called[3] else "released")
    ce, targeted, fab, square = called
    assert ce.steps == targeted.steps == fab.steps == 7
    assert ce.eot_iter == targeted.eot_iter == 5
    assert targeted.n_target_classes == fab.n_target_classes == 3  # all other classes
    assert square.n_queries == 33


@pytest.mark.parametrize("name", ATTACKS)
def test_as_many_classes_as_an_attack_needs(name: str) -> None:
    needed = {"apgd-t": 4}.get(name, 2)
    for classes in (1, 2, 3, 4):
        defence = toy(classes)
        images, labels = toy_images(defence, 4)
        targets = TargetImages.embed(defence, images, labels)
        if classes >= needed:
            found = attack(name, defence, images, labels, targets=targets, queries=20)
            assert found.shape == images.shape
        elif name not in OURS:
            with pytest.raises(
                SettingsError, match=f"{name} needs {needed} classes or more, here "
            ):
                build(name, defence, "exact", threat(), targets)


def test_bad_names() -> None:
    defence = toy()
    targets = TargetImages.embed(defence, *toy_images(defence, 5))
    for name in ("autoattack", "apgd", ""):
        with pytest.raises(KeyError):
            build(name, defence, "exact", threat(), targets)
    with pytest.raises(KeyError):
        build("apgd-ce", defence, "exact", Threat("l1", 0.1, 1, 0.1), targets)
    with pytest.raises(ValueError, match="norm must be linf or l2"):
        build("pgd", defence, "exact", Threat("l1", 0.1, 1, 0.1), targets)(
            *toy_images(defence, 5), torch.arange(5)
        )


# A targets of images to be taken for.


def test_target_images_are_unit_embeddings_of_the_defence() -> None:
    defence = toy(purifier=CosPurifier(9, 30.0))
    images, labels = toy_images(defence, 33)
    targets = TargetImages.embed(defence, images, labels)
    assert torch.equal(targets.labels, labels)
    for gradient in GRADIENTS:
        assert not targets.embeddings(gradient).requires_grad
        expected = F.normalize(defence.view(images, gradient).embedding, dim=1)
        torch.testing.assert_close(
            targets.embeddings(gradient), expected.detach(), rtol=0, atol=1e-4
        )
    assert (targets.embeddings("exact") - targets.embeddings("encoder")).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("gradient", ["exact", "encoder"])
@pytest.mark.parametrize("count", [1, 33, 2049])
def test_nearest_image_of_another_class_equals_a_plain_loop(count: int, gradient: str) -> None:
    rng = torch.Generator().manual_seed(count)
    rows = [F.normalize(torch.randn(50, 6, generator=rng), dim=1) for _ in range(2)]
    targets = TargetImages(*rows, torch.randint(5, (50,), generator=rng))
    embeddings = F.normalize(torch.randn(count, 6, generator=rng), dim=1)
    labels = torch.randint(5, (count,), generator=rng)
    found = targets.nearest(3 * embeddings, labels, gradient).tolist()
    for i in range(0, count, 37):
        others = [j for j in range(50) if targets.labels[j] != labels[i]]
        distances = [
            float((targets.embeddings(gradient)[j] - embeddings[i]).norm()) for j in others
        ]
        assert found[i] == others[distances.index(min(distances))]
    assert (targets.labels[found] != labels).all()


def test_one_class_is_no_bank() -> None:
    defence = toy()
    images, labels = toy_images(defence, 10)
    same = labels == 0
    targets = TargetImages.embed(defence, images[same], labels[same])
    with pytest.raises(SettingsError, match="'feature' needs images of two classes"):
        attack("feature", defence, images, labels, targets=targets)
    others = labels != 0  # for these alone the targets does
    found = attack("feature", defence, images[others], labels[others], targets=targets)
    assert found.shape == images[others].shape


def distances_to_aims(
    purifier: CosPurifier | None, gradient: str, norm: str = "linf"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distances to the nearest images of other classes, before and after an attack."""
    defence = toy(purifier=purifier)
    images, labels = toy_images(defence, 12, 10 / 255, 20 / 255)
    targets = TargetImages.embed(defence, images, labels)
    space = targets.embeddings(gradient)
    aims = space[targets.nearest(space, labels, gradient)]
    eps = EPS[norm] / 4  # too little to be named wrongly, and to stop there
    step = {"norm": norm, "eps": eps, "step_size": eps / 4}
    found = attack("feature", defence, images, labels, gradient, targets=targets, **step)
    assert correct(defence, found, labels).all()
    with torch.no_grad():
        reached = F.normalize(defence.view(found, gradient).embedding, dim=1)
    return (space - aims).norm(dim=1), (reached - aims).norm(dim=1)


@pytest.mark.parametrize("gradient", ["exact", "identity", "encoder"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("purifier", [None, CosPurifier(10, 30.0), CosPurifier(3, 0.05)], ids=str)
def test_feature_moves_towards_the_nearest_image_of_another_class(
    purifier: CosPurifier | None, norm: str, gradient: str
) -> None:
    before, after = distances_to_aims(purifier, gradient, norm)
    assert (after < before - 0.05).all()
    torch.testing.assert_close(distances_to_aims(None, "exact", norm)[1], after, rtol=0, atol=0.1)


def test_feature_by_the_released_gradient_goes_nowhere() -> None:
    before, after = distances_to_aims(CosPurifier(10, 30.0), "released")
    assert (after - before).mean().abs() < 0.02


def test_feature_gets_as_near_as_any_attack() -> None:
    defence = toy()
    images, labels = toy_images(defence, 12, 10 / 255, 20 / 255)
    targets = TargetImages.embed(defence, images, labels)
    space = targets.embeddings("exact")
    aims = space[targets.nearest(space, labels, "exact")]
    apart = {}
    for name in OURS:
        found = attack(
            name, defence, images, labels, targets=targets, eps=2 / 255, step_size=0.5 / 255
        )
        with torch.no_grad():
            reached = F.normalize(defence.view(found, "exact").embedding, dim=1)
        apart[name] = (reached - aims).norm(dim=1)
    for name in ("pgd", "cw"):
        assert (apart["feature"] <= apart[name] + 1e-6).all()


# When an attack stops.


def turned() -> tuple[Defence, torch.Tensor, torch.Tensor]:
    """Return a defence that reverses answers, and images that only its encoder classifies correctly."""
    defence = toy(purifier=CosPurifier(9, 30.0))
    images, labels = toy_images(defence, 9, 10 / 255, 20 / 255)
    assert (defence.view(images, "encoder").logits.argmax(1) == labels).all()
    assert not correct(defence, images, labels).any()
    return defence, images, labels


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("gradient", ["exact", "identity", "encoder"])
def test_stops_on_the_defences_own_answer(gradient: str, name: str) -> None:
    """Stop in encoder mode too, where the attacked model still classifies the images correctly."""
    defence, images, labels = turned()
    small = {"eps": 1 / 255, "step_size": 0.5 / 255}
    start = attack(name, defence, images, labels, gradient, steps=0, **small)
    assert (start != images).any()
    found = attack(name, defence, images, labels, gradient, steps=5, **small)
    assert torch.equal(found, start)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_goes_on_while_the_defence_is_right(gradient: str, name: str) -> None:
    """Continue in encoder mode too, although the attacked model misclassifies the images."""
    defence, images, _ = turned()
    own = defence(images).argmax(1)
    targets = TargetImages.embed(
        defence, images, (own + torch.arange(9)) % 5
    )  # of more than one class
    small = {"eps": 0.01 / 255, "step_size": 0.005 / 255, "targets": targets}
    start = attack(name, defence, images, own, gradient, steps=0, **small)
    found = attack(name, defence, images, own, gradient, steps=5, **small)
    assert correct(defence, found, own).all()
    assert (found != start).flatten(1).any(1).all()


@pytest.mark.parametrize("name", OURS)
def test_released_gradient_does_not_stop_early(name: str) -> None:
    """Keep the last image: asking the defence at each step would be a search of its own."""
    defence, images, labels = turned()
    small = {"eps": 1 / 255, "step_size": 0.5 / 255}
    start = attack(name, defence, images, labels, "released", steps=0, **small)
    found = attack(name, defence, images, labels, "released", steps=5, **small)
    assert (found != start).flatten(1).any(1).all()


# Chance.


@pytest.mark.parametrize("name", ATTACKS)
def test_same_seed_same_result(name: str) -> None:
    defence = toy(purifier=CosPurifier(3, 0.02))
    images, labels = toy_images(defence, 7, 10 / 255, 20 / 255)
    eps = 2 / 255 if name in OURS else 50 / 255  # the library's show what was successful
    small = {"eps": eps, "step_size": 1 / 255, "steps": 3, "queries": 100}
    first = attack(name, defence, images, labels, **small)
    torch.rand(5)
    torch.testing.assert_close(
        attack(name, defence, images, labels, **small), first, rtol=0, atol=0
    )
    if name in OURS:
        other = attack(name, defence, images, labels, seeds=torch.arange(7) + 100, **small)
        assert (other != first).flatten(1).any(1).all()
    else:
        assert (first != images).any()
    if name in ("apgd-ce", "apgd-t", "square"):
        assert not torch.equal(attack(name, defence, images, labels, seed=1, **small), first)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", OURS)
def test_an_image_does_not_depend_on_those_beside_it(name: str, norm: str, gradient: str) -> None:
    defence = toy(purifier=CosPurifier(3, 0.02)).double()  # whose gradients' signs are sure
    images, labels = toy_images(defence, 33)
    images, seeds = images.double(), torch.arange(33) * 7
    targets = TargetImages.embed(defence, images[:20], labels[:20])
    if gradient == "released":  # left is what rounding leaves
        defence.purifier = CosPurifier(1, 0.02)
    given = {"norm": norm, "restarts": 1, "targets": targets}
    together = attack(name, defence, images, labels, gradient, seeds, **given)
    assert 0 < correct(defence, together, labels).float().mean() < 1 or name == "feature"
    for chosen in ([5], [32, 0, 7]):
        part = torch.tensor(chosen)
        alone = attack(name, defence, images[part], labels[part], gradient, seeds[part], **given)
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-9)


def test_restarts_find_more() -> None:
    defence = toy()
    images, labels = toy_images(defence, 33)
    weak = {"steps": 0, "eps": 60 / 255}
    counts = []
    for restarts in (1, 50):
        found = attack("pgd", defence, images, labels, restarts=restarts, **weak)
        counts.append(correct(defence, found, labels).sum())
    assert counts[1] < counts[0]


def test_eot_asks_for_as_many_gradients() -> None:
    defence, counted = toy(), []
    images, labels = toy_images(defence, 3, 15 / 255)
    defence.model.register_forward_hook(lambda *_: counted.append(torch.is_grad_enabled()))
    attack(
        "cw",
        defence,
        images,
        labels,
        eot=4,
        steps=3,
        eps=1 / 255,
        targets=TargetImages(images, images, labels),
    )
    assert sum(counted) == 12


# Stages.


def test_a_cascade_attacks_what_is_left() -> None:
    assert plan(["autoattack"], ["exact"], 10) == [
        Stage("apgd-ce", "exact", "autoattack/apgd-ce/exact", "clean"),
        Stage("apgd-t", "exact", "autoattack/apgd-t/exact", "autoattack/apgd-ce/exact"),
        Stage("fab-t", "exact", "autoattack/fab-t/exact", "autoattack/apgd-t/exact"),
        Stage("square", "exact", "autoattack/square/exact", "autoattack/fab-t/exact"),
    ]


def test_single_attacks_stand_alone() -> None:
    found = plan(list(ATTACKS), ["exact"], 10)
    assert [stage.attack for stage in found] == list(ATTACKS)
    assert all(stage.after == "clean" for stage in found)
    assert [stage.key for stage in found] == [f"{name}/exact" for name in ATTACKS]


@pytest.mark.parametrize("attacks", [["autoattack"], ["square"], ["autoattack", "pgd", "square"]])
def test_square_runs_once(attacks: list[str]) -> None:
    """Square uses only answers, which no gradient changes."""
    found = plan(attacks, GRADIENTS, 10)
    squares = [stage for stage in found if stage.attack == "square"]
    assert [stage.gradient for stage in squares] == ["exact"] * sum(a != "pgd" for a in attacks)
    others = [stage for stage in found if stage.attack != "square"]
    for gradient in GRADIENTS:
        names = [stage.attack for stage in others if stage.gradient == gradient]
        assert names.count("apgd-ce") == names.count("fab-t") == attacks.count("autoattack")
        assert names.count("pgd") == attacks.count("pgd")


def test_each_gradient_has_a_cascade_of_its_own() -> None:
    found = plan(["autoattack"], ["exact", "identity"], 10)
    second = [stage for stage in found if stage.gradient == "identity"]
    assert [stage.attack for stage in second] == ["apgd-ce", "apgd-t", "fab-t"]
    assert second[0].after == "clean"
    assert all(stage.after.endswith("/identity") for stage in second[1:])


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_go_without_apgd_t(classes: int) -> None:
    found = plan(["autoattack"], ["exact"], classes)
    assert [stage.attack for stage in found] == ["apgd-ce", "fab-t", "square"]
    assert [stage.after for stage in found] == ["clean", *(stage.key for stage in found[:2])]
    (alone,) = plan(["apgd-t"], ["exact"], classes)  # asked for by name: refused when it is built
    assert alone.attack == "apgd-t"
    assert "apgd-t" in [stage.attack for stage in plan(["autoattack"], ["exact"], 4)]


def test_stages_have_keys_of_their_own_and_come_after_what_they_need() -> None:
    found = plan(["autoattack", *ATTACKS], GRADIENTS, 10)
    keys = [stage.key for stage in found]
    assert len(set(keys)) == len(keys)
    known = {"clean"}
    for stage in found:
        assert stage.after in known
        known.add(stage.key)
    assert plan([], GRADIENTS, 10) == []


# CLIPure-Diff, whose seed an attack may not know.

UNSURE = DiffPurifier(2, 0.1, (0, 999), 5)


def diff_toy(purifier: DiffPurifier = UNSURE, prior: torch.nn.Module | None = None) -> Defence:
    plain = toy(purifier=purifier)
    prior = prior or null_prior(6).float()
    return Defence(plain.model, plain.null_text, purifier, prior).eval()


def with_seed(defence: Defence, seed: int) -> Defence:
    return diff_toy(replace(defence.purifier, seed=seed), defence.prior)


@pytest.mark.parametrize("mode", GRADIENTS)
def test_answers_are_the_defences_own_and_gradients_of_guessed_seeds(mode: str) -> None:
    defence = diff_toy()
    images, _ = toy_images(defence, 5)
    unknown = UnknownSeed(defence, 9)
    draws = random.Random(9)
    for _ in range(3):
        other = with_seed(defence, draws.randint(0, 2**32 - 1))
        seen = images.clone().requires_grad_()
        view = unknown.view(seen, mode)
        mirrored = images.clone().requires_grad_()
        wanted = other.view(mirrored, mode)
        assert torch.equal(view.answer, defence(images))
        assert not view.answer.requires_grad
        assert torch.equal(view.logits, wanted.logits)
        assert torch.equal(view.embedding, wanted.embedding)
        slopes = [
            torch.autograd.grad(x.logits[:, 0].sum(), y)[0]
            for x, y in ((view, seen), (wanted, mirrored))
        ]
        assert torch.equal(*slopes)
        if mode != "encoder":  # which sees no seed at all
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
    made: list[UnknownSeed] = []

    class Recorded(UnknownSeed):
        def __init__(self, defence: Defence, seed: int) -> None:
            super().__init__(defence, seed)
            made.append(self)

    monkeypatch.setattr("train.robustness.threat.UnknownSeed", Recorded)
    return made


def test_seed_is_guessed_where_draws_are_averaged(guesses: list[UnknownSeed]) -> None:
    defence = diff_toy()
    targets = TargetImages.embed(defence, *toy_images(defence, 20))
    for name in ATTACKS:
        build(name, defence, "exact", threat(eot=1), targets)
        build(name, toy(purifier=CosPurifier(3, 0.02)), "exact", threat(eot=3), targets)
    assert guesses == []
    for name in ATTACKS:
        build(name, defence, "exact", threat(eot=3, seed=7), targets)
    assert len(guesses) == len(ATTACKS) - 1  # square asks for answers alone
    assert {guess.seed for guess in guesses} == {7}


@pytest.mark.parametrize("name", ["pgd", "cw", "feature", "apgd-ce"])
def test_what_was_attacked_before_is_no_matter(name: str) -> None:
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


class Misled(torch.nn.Module):
    """Prior that leaves the answers of the true seed unchanged, and reverses those of all others."""

    def __init__(self, purifier: DiffPurifier) -> None:
        super().__init__()
        self.noise = torch.from_numpy(purifier.draws(6)[1][0])

    def gradient(self, unit: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
        if torch.equal(noise, self.noise):
            return 0 * unit
        return unit - unit.mean(dim=1, keepdim=True)  # away from every class there is


@pytest.mark.parametrize("name", ["pgd", "cw", "apgd-ce", "apgd-t", "fab-t"])
def test_images_that_a_guess_names_wrongly_are_attacked(name: str) -> None:
    """Attack by the answer of the true seed, whatever the library sees by other seeds."""
    purifier = DiffPurifier(1, 30.0, (0, 999), 5)
    defence = diff_toy(purifier, Misled(purifier))
    images, labels = toy_images(defence, 9)
    assert correct(defence, images, labels).all()
    wrong = ~correct(with_seed(defence, 6), images, labels)
    assert wrong.float().mean() > 0.5
    found = attack(name, defence, images, labels, eot=2, steps=4)
    moved = (found != images).flatten(1).any(1)
    assert moved[wrong].all()
