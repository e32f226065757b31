"""What a purification option means."""

from __future__ import annotations

import pytest

from edgeclip import BundleError, CosPurifier
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
    with pytest.raises(BundleError, match="needs a bundle with a diffusion prior"):
        resolve("diff", None)
    with pytest.raises(ValueError, match="must be auto, none, cos or diff"):
        resolve("Cos", None)
