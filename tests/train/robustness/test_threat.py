"""Attacks by name: their bounds, when they stop, and their seeds."""

from __future__ import annotations

import pytest
import torch

from edgeclip.purify import CosPurifier
from tests.support.models.toy_models import toy, toy_images
from tests.support.robustness.threats import EPS, NATIVE, attack, threat
from train.errors import SettingsError
from train.robustness.defence import Defence, correct
from train.robustness.result_file import GRADIENTS
from train.robustness.threat import ATTACKS, TargetImages, Threat, build


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
    for gradient in GRADIENTS if name in NATIVE else ("exact", "encoder"):
        attacked = attack(name, defence, images, labels, gradient, norm=norm, **changes)
        assert attacked.shape == images.shape
        assert attacked.dtype == images.dtype
        assert attacked.isfinite().all()
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        moved = (attacked - images).flatten(1)
        size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        assert size.max() <= eps * (1 + 1e-5)
        assert size.max() > 0.5 * eps or (edges and name not in NATIVE)  # some images move


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_images_within_easy_reach_are_misclassified(name: str, norm: str) -> None:
    """Attack images of a small margin; the images and weights themselves do not change."""
    defence = toy()
    images, labels = toy_images(defence, 10, 4 / 255, 6 / 255)
    original, weights = images.clone(), [p.clone() for p in defence.parameters()]
    eps = 16 / 255 if norm == "linf" else 0.9
    more = {"eps": eps, "step_size": eps / 4, "queries": 1000}
    attacked = attack(name, defence, images, labels, norm=norm, **more)
    assert correct(defence, images, labels).all()
    accuracy = correct(defence, attacked, labels).float().mean()
    assert accuracy <= (0.2 if name == "square" else 0)
    assert torch.equal(images, original)
    for parameter, weight in zip(defence.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
        assert parameter.grad is None or name == "fab-t"  # the library calls backward()


@pytest.mark.parametrize("name", ATTACKS)
def test_as_many_classes_as_an_attack_needs(name: str) -> None:
    needed = {"apgd-t": 4}.get(name, 2)
    for classes in (1, 2, 3, 4):
        defence = toy(classes)
        images, labels = toy_images(defence, 4)
        targets = TargetImages.embed(defence, images, labels)
        if classes >= needed:
            attacked = attack(name, defence, images, labels, targets=targets, queries=20)
            assert attacked.shape == images.shape
        elif name not in NATIVE:
            with pytest.raises(
                SettingsError,
                match=f"{name} needs {needed} classes or more, and the data set has {classes}",
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


def reversed_defence() -> tuple[Defence, torch.Tensor, torch.Tensor]:
    """Return a defence that reverses answers, and images that only its encoder classifies correctly."""
    defence = toy(purifier=CosPurifier(9, 30.0))
    images, labels = toy_images(defence, 9, 10 / 255, 20 / 255)
    assert (defence.view(images, "encoder").logits.argmax(1) == labels).all()
    assert not correct(defence, images, labels).any()
    return defence, images, labels


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("gradient", ["exact", "identity", "encoder"])
def test_stops_on_the_defences_answer(gradient: str, name: str) -> None:
    """Stop in encoder mode too, where the attacked model still classifies the images correctly."""
    defence, images, labels = reversed_defence()
    small = {"eps": 1 / 255, "step_size": 0.5 / 255}
    start = attack(name, defence, images, labels, gradient, steps=0, **small)
    assert (start != images).any()
    attacked = attack(name, defence, images, labels, gradient, steps=5, **small)
    assert torch.equal(attacked, start)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_continues_while_the_defence_is_right(gradient: str, name: str) -> None:
    """Continue in encoder mode too, although the attacked model misclassifies the images."""
    defence, images, _ = reversed_defence()
    predicted = defence(images).argmax(1)
    labels = (predicted + torch.arange(9)) % 5  # more than one class
    targets = TargetImages.embed(defence, images, labels)
    small = {"eps": 0.01 / 255, "step_size": 0.005 / 255, "targets": targets}
    start = attack(name, defence, images, predicted, gradient, steps=0, **small)
    attacked = attack(name, defence, images, predicted, gradient, steps=5, **small)
    assert correct(defence, attacked, predicted).all()
    assert (attacked != start).flatten(1).any(1).all()


@pytest.mark.parametrize("name", NATIVE)
def test_released_gradient_does_not_stop_early(name: str) -> None:
    """Keep the last image: to ask the defence at each step would be another attack."""
    defence, images, labels = reversed_defence()
    small = {"eps": 1 / 255, "step_size": 0.5 / 255}
    start = attack(name, defence, images, labels, "released", steps=0, **small)
    attacked = attack(name, defence, images, labels, "released", steps=5, **small)
    assert (attacked != start).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_same_seed_same_result(name: str) -> None:
    defence = toy(purifier=CosPurifier(3, 0.02))
    images, labels = toy_images(defence, 7, 10 / 255, 20 / 255)
    eps = 2 / 255 if name in NATIVE else 50 / 255  # the library returns only successful attacks
    small = {"eps": eps, "step_size": 1 / 255, "steps": 3, "queries": 100}
    first = attack(name, defence, images, labels, **small)
    torch.rand(5)
    torch.testing.assert_close(
        attack(name, defence, images, labels, **small), first, rtol=0, atol=0
    )
    if name in NATIVE:
        other = attack(name, defence, images, labels, seeds=torch.arange(7) + 100, **small)
        assert (other != first).flatten(1).any(1).all()
    else:
        assert (first != images).any()
    if name in ("apgd-ce", "apgd-t", "square"):
        assert not torch.equal(attack(name, defence, images, labels, seed=1, **small), first)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", NATIVE)
def test_an_image_does_not_depend_on_its_batch(name: str, norm: str, gradient: str) -> None:
    defence = toy(purifier=CosPurifier(3, 0.02)).double()  # gradients' signs without rounding
    images, labels = toy_images(defence, 33)
    images, seeds = images.double(), torch.arange(33) * 7
    targets = TargetImages.embed(defence, images[:20], labels[:20])
    if gradient == "released":  # the gradient of more steps is rounding alone
        defence.purifier = CosPurifier(1, 0.02)
    settings = {"norm": norm, "restarts": 1, "targets": targets}
    together = attack(name, defence, images, labels, gradient, seeds, **settings)
    assert 0 < correct(defence, together, labels).float().mean() < 1 or name == "feature"
    for rows in ([5], [32, 0, 7]):
        part = torch.tensor(rows)
        alone = attack(name, defence, images[part], labels[part], gradient, seeds[part], **settings)
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-9)


def test_restarts_find_more() -> None:
    defence = toy()
    images, labels = toy_images(defence, 33)
    weak = {"steps": 0, "eps": 60 / 255}
    counts = []
    for restarts in (1, 50):
        attacked = attack("pgd", defence, images, labels, restarts=restarts, **weak)
        counts.append(correct(defence, attacked, labels).sum())
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
