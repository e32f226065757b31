"""What a purification option means."""

from __future__ import annotations

import pytest

from edgeclip import CosPurifier, DiffPurifier
from edgeclip.purify import resolve


def test_defaults_are_the_published_setting() -> None:
    assert CosPurifier() == CosPurifier(steps=10, step_size=30.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"steps": 10_001},
        {"steps": 1.5},
        {"step_size": -1.0},
        {"step_size": float("nan")},
        {"step_size": 1e999},
    ],
)
def test_bad_parameters(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be 0 "):
        CosPurifier(**bad)


def test_names() -> None:
    recommended = CosPurifier(3, 0.5)
    assert resolve("auto", recommended) is recommended
    assert resolve("auto", None) is None
    assert resolve("none", recommended) is None
    assert resolve(None, recommended) is None
    assert resolve("cos", recommended) is recommended
    assert resolve("cos", None) == CosPurifier()
    assert resolve(CosPurifier(1, 2.0), None) == CosPurifier(1, 2.0)
    assert resolve("diff", recommended) == DiffPurifier()
    assert resolve("diff", DiffPurifier(2, 0.1)) == DiffPurifier(2, 0.1)
    assert resolve("cos", DiffPurifier(2, 0.1)) == CosPurifier()
    with pytest.raises(ValueError, match="must be auto, none, cos or diff"):
        resolve("Cos", None)
