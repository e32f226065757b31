"""Purification settings: validation, options, JSON and random draws."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeclip import BundleError, CosPurifier, DiffPurifier
from edgeclip.purify import MAX_SEED, Purifier, check_prior, from_dict, resolve, to_dict


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


# CLIPure-Diff.


def test_published_setting_of_diff() -> None:
    assert DiffPurifier() == DiffPurifier(10, 30.0, (900, 999), 0)
    assert str(DiffPurifier()) == "diff 10 x 30 t 900-999 seed 0"
    assert str(DiffPurifier(3, 0.25, (0, 9), 7)) == "diff 3 x 0.25 t 0-9 seed 7"
    assert len({DiffPurifier(), DiffPurifier(), DiffPurifier(seed=1)}) == 2


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": -1}, "steps must be 0 to 10000, got -1"),
        ({"steps": 10_001}, "steps must be 0 to 10000"),
        ({"steps": 1.5}, "steps must be 0 to 10000"),
        ({"step_size": -1.0}, "step size must be 0 or more"),
        ({"step_size": float("nan")}, "step size must be 0 or more"),
        ({"step_size": 1e999}, "step size must be 0 or more"),
        ({"timesteps": (10, 9)}, "timesteps must be the first and the last"),
        ({"timesteps": (-1, 9)}, "timesteps must be the first and the last"),
        ({"timesteps": (0.5, 9)}, "timesteps must be the first and the last"),
        ({"timesteps": (0, "9")}, "timesteps must be the first and the last"),
        ({"timesteps": (0, 1, 2)}, "must be the first and the last"),
        ({"timesteps": (5,)}, "must be the first and the last"),
        ({"seed": -1}, "seed must be 0 to 4294967295"),
        ({"seed": 2**32}, "seed must be 0 to 4294967295"),
        ({"seed": 0.5}, "seed must be 0 to 4294967295"),
        ({"seed": None}, "seed must be 0 to 4294967295"),
    ],
)
def test_bad_parameters_of_diff(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffPurifier(**bad)


@pytest.mark.parametrize("seed", [0, 3, MAX_SEED])
@pytest.mark.parametrize(("steps", "dim"), [(0, 5), (1, 1), (10, 33), (3, 2049)])
def test_draws_are_numpys(steps: int, dim: int, seed: int) -> None:
    """Timesteps first, then the noise: in whole arrays, so another number of steps gives others."""
    times, noise = DiffPurifier(steps, 1.0, (900, 999), seed).draws(dim)
    random = np.random.RandomState(seed)
    wanted = [random.randint(900, 1000) for _ in range(steps)]
    assert times.dtype == np.int64
    assert noise.dtype == np.float32
    assert times.tolist() == wanted
    assert noise.shape == (steps, dim)
    values = [np.float32(random.standard_normal()) for _ in range(steps * dim)]
    assert noise.ravel().tolist() == values


def test_draws_stay_what_they_are() -> None:
    times, noise = DiffPurifier(3, 1.0, (900, 999), 0).draws(4)
    assert times.tolist() == [944, 947, 964]
    pinned = np.random.RandomState(0)
    pinned.randint(900, 1000, size=3)
    np.testing.assert_array_equal(noise[0], pinned.standard_normal(4).astype(np.float32))
    assert DiffPurifier(9, 1.0, (7, 7)).draws(1)[0].tolist() == [7] * 9
    spread = DiffPurifier(2000, 1.0, (3, 12)).draws(1)[0]
    assert sorted(set(spread.tolist())) == list(range(3, 13))


def test_draws_touch_nothing_that_is_shared() -> None:
    np.random.seed(5)
    first = np.random.random()
    np.random.seed(5)
    DiffPurifier().draws(4)
    assert np.random.random() == first


@pytest.mark.parametrize(
    "purifier",
    [None, CosPurifier(3, 0.5), DiffPurifier(), DiffPurifier(2, 0.1, (0, 9), 4)],
    ids=str,
)
def test_written_and_read_again(purifier: Purifier) -> None:
    written = json.loads(json.dumps(to_dict(purifier)))
    assert from_dict(written) == purifier
    if isinstance(purifier, CosPurifier):
        assert written == {"steps": 3, "step_size": 0.5}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"steps": 3},
        {"steps": "many", "step_size": 1},
        {"steps": 3, "step_size": 1.0, "method": "best"},
        {"steps": 3, "step_size": 1.0, "method": "diff"},
        {"steps": 3, "step_size": 1.0, "method": "diff", "timesteps": [1], "seed": 0},
        {"steps": 3, "step_size": 1.0, "method": "diff", "timesteps": [2, 1], "seed": 0},
        {"steps": -3, "step_size": 1.0},
    ],
)
def test_what_was_never_written_is_not_read(data: dict) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        from_dict(data)


def test_priors_that_a_purifier_needs() -> None:
    for purifier in (None, CosPurifier()):
        check_prior(purifier, None)
    check_prior(DiffPurifier(), 1000)
    with pytest.raises(BundleError, match="and this one has none: export it with --prior"):
        check_prior(DiffPurifier(), None)
    with pytest.raises(BundleError, match="prior has the timesteps 0 to 998"):
        check_prior(DiffPurifier(), 999)
