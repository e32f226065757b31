"""Feature matching: its target images, and the distances to them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgeclip.purify import CosPurifier
from tests.support.models.toy_models import toy, toy_images
from tests.support.robustness.threats import EPS, NATIVE, attack
from train.errors import SettingsError
from train.robustness.defence import correct
from train.robustness.result_file import GRADIENTS
from train.robustness.threat import TargetImages


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
    nearest = targets.nearest(3 * embeddings, labels, gradient).tolist()
    for i in range(0, count, 37):
        others = [j for j in range(50) if targets.labels[j] != labels[i]]
        distances = [
            float((targets.embeddings(gradient)[j] - embeddings[i]).norm()) for j in others
        ]
        assert nearest[i] == others[distances.index(min(distances))]
    assert (targets.labels[nearest] != labels).all()


def test_targets_of_one_class_are_refused() -> None:
    defence = toy()
    images, labels = toy_images(defence, 10)
    same = labels == 0
    targets = TargetImages.embed(defence, images[same], labels[same])
    with pytest.raises(SettingsError, match="'feature' needs images of two classes"):
        attack("feature", defence, images, labels, targets=targets)
    others = labels != 0  # the targets have another class for these
    attacked = attack("feature", defence, images[others], labels[others], targets=targets)
    assert attacked.shape == images[others].shape


def distances_to_aims(
    purifier: CosPurifier | None, gradient: str, norm: str = "linf"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distances to the nearest images of other classes, before and after an attack."""
    defence = toy(purifier=purifier)
    images, labels = toy_images(defence, 12, 10 / 255, 20 / 255)
    targets = TargetImages.embed(defence, images, labels)
    space = targets.embeddings(gradient)
    aims = space[targets.nearest(space, labels, gradient)]
    eps = EPS[norm] / 4  # too small to fool the defence, which would end the attack
    step = {"norm": norm, "eps": eps, "step_size": eps / 4}
    attacked = attack("feature", defence, images, labels, gradient, targets=targets, **step)
    assert correct(defence, attacked, labels).all()
    with torch.no_grad():
        reached = F.normalize(defence.view(attacked, gradient).embedding, dim=1)
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
    for name in NATIVE:
        attacked = attack(
            name, defence, images, labels, targets=targets, eps=2 / 255, step_size=0.5 / 255
        )
        with torch.no_grad():
            reached = F.normalize(defence.view(attacked, "exact").embedding, dim=1)
        apart[name] = (reached - aims).norm(dim=1)
    for name in ("pgd", "cw"):
        assert (apart["feature"] <= apart[name] + 1e-6).all()
