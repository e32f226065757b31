"""AutoAttack's published settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks

from tests.support.models.toy_models import toy, toy_images
from tests.support.robustness.threats import EPS, attack
from train.robustness.threat import AUTOATTACK, TargetImages, Threat, build


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[torchattacks.attack.Attack]:
    """Record calls of the library's attacks instead of running them."""
    instances: list[torchattacks.attack.Attack] = []

    def call(self: torchattacks.attack.Attack, images: torch.Tensor, labels: torch.Tensor):  # type: ignore[no-untyped-def]
        instances.append(self)
        return images

    monkeypatch.setattr(torchattacks.attack.Attack, "__call__", call)
    return instances


@pytest.mark.parametrize(("norm", "library_norm"), [("linf", "Linf"), ("l2", "L2")])
def test_settings_are_those_of_autoattacks_standard_version(
    called: list[Any], norm: str, library_norm: str
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
    for instance, kind in zip(called, classes, strict=True):
        assert type(instance) is kind
        assert (instance.norm, instance.eps, instance.n_restarts, instance.seed) == (
            library_norm,
            EPS[norm],
            1,
            7,
        )
        assert instance.model.defence is defence
        # Square queries the whole defence.
        assert instance.model.gradient == ("exact" if instance is square else "identity")
        assert not instance.model.training
        assert not instance.targeted
    for instance in (ce, targeted):
        assert (instance.steps, instance.thr_decr, instance.eot_iter) == (100, 0.75, 1)
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
    settings = {"steps": 7, "restarts": 3, "queries": 33, "eot": 5, "seed": 11, "eps": 0.1}
    for name in AUTOATTACK:
        attack(name, defence, images, labels, "released", **settings)
    for instance in called:
        assert (instance.eps, instance.n_restarts, instance.seed) == (0.1, 3, 11)
        assert instance.model.gradient == ("exact" if instance is called[3] else "released")
    ce, targeted, fab, square = called
    assert ce.steps == targeted.steps == fab.steps == 7
    assert ce.eot_iter == targeted.eot_iter == 5
    assert targeted.n_target_classes == fab.n_target_classes == 3  # all other classes
    assert square.n_queries == 33
