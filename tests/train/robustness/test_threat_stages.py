"""Stages of AutoAttack and of single attacks."""

from __future__ import annotations

import pytest

from train.robustness.result_file import GRADIENTS
from train.robustness.threat import ATTACKS, Stage, plan


def test_a_cascade_attacks_the_remaining_images() -> None:
    assert plan(["autoattack"], ["exact"], 10) == [
        Stage("apgd-ce", "exact", "autoattack/apgd-ce/exact", "clean"),
        Stage("apgd-t", "exact", "autoattack/apgd-t/exact", "autoattack/apgd-ce/exact"),
        Stage("fab-t", "exact", "autoattack/fab-t/exact", "autoattack/apgd-t/exact"),
        Stage("square", "exact", "autoattack/square/exact", "autoattack/fab-t/exact"),
    ]


def test_single_attacks_stand_alone() -> None:
    stages = plan(list(ATTACKS), ["exact"], 10)
    assert [stage.attack for stage in stages] == list(ATTACKS)
    assert all(stage.after == "clean" for stage in stages)
    assert [stage.key for stage in stages] == [f"{name}/exact" for name in ATTACKS]


@pytest.mark.parametrize("attacks", [["autoattack"], ["square"], ["autoattack", "pgd", "square"]])
def test_square_runs_once(attacks: list[str]) -> None:
    """Square uses only answers, which no gradient changes."""
    stages = plan(attacks, GRADIENTS, 10)
    squares = [stage for stage in stages if stage.attack == "square"]
    assert [stage.gradient for stage in squares] == ["exact"] * sum(a != "pgd" for a in attacks)
    others = [stage for stage in stages if stage.attack != "square"]
    for gradient in GRADIENTS:
        names = [stage.attack for stage in others if stage.gradient == gradient]
        assert names.count("apgd-ce") == names.count("fab-t") == attacks.count("autoattack")
        assert names.count("pgd") == attacks.count("pgd")


def test_each_gradient_has_its_cascade() -> None:
    stages = plan(["autoattack"], ["exact", "identity"], 10)
    second = [stage for stage in stages if stage.gradient == "identity"]
    assert [stage.attack for stage in second] == ["apgd-ce", "apgd-t", "fab-t"]
    assert second[0].after == "clean"
    assert all(stage.after.endswith("/identity") for stage in second[1:])


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_go_without_apgd_t(classes: int) -> None:
    stages = plan(["autoattack"], ["exact"], classes)
    assert [stage.attack for stage in stages] == ["apgd-ce", "fab-t", "square"]
    assert [stage.after for stage in stages] == ["clean", *(stage.key for stage in stages[:2])]
    (alone,) = plan(["apgd-t"], ["exact"], classes)  # build refuses it
    assert alone.attack == "apgd-t"
    assert "apgd-t" in [stage.attack for stage in plan(["autoattack"], ["exact"], 4)]


def test_stages_have_unique_keys_and_follow_their_prerequisites() -> None:
    stages = plan(["autoattack", *ATTACKS], GRADIENTS, 10)
    keys = [stage.key for stage in stages]
    assert len(set(keys)) == len(keys)
    known = {"clean"}
    for stage in stages:
        assert stage.after in known
        known.add(stage.key)
    assert plan([], GRADIENTS, 10) == []
