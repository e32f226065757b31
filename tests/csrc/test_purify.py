"""_core.purify_cos against the output of the released CLIPure code and a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest

from edgeclip import _core
from tests.support.models.clipure_reference import (
    GOLDEN,
    polar_by_vectors,
    purify_by_steps,
    relative_error,
)


def at_angle(degrees: float, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a float32 embedding of norm 1 and a null text, with this angle between them."""
    rng = np.random.default_rng(seed)
    t, w = np.linalg.qr(rng.standard_normal((dim, 2)))[0].T
    z = np.cos(np.radians(degrees)) * t + np.sin(np.radians(degrees)) * w
    return z.astype(np.float32)[None], t.astype(np.float32)


def test_golden_values() -> None:
    golden = np.load(GOLDEN)
    z, t = golden["z"].astype(np.float32), golden["t"].astype(np.float32)
    for i, steps in enumerate(golden["steps"]):
        for j, step_size in enumerate(golden["step_sizes"]):
            got = _core.purify_cos(z, t, steps=int(steps), step_size=float(step_size))
            assert got.dtype == np.float32
            assert relative_error(got, golden["purified"][i, j]) < 1e-5, (steps, step_size)


@pytest.mark.parametrize("dim", [2, 15, 16, 33, 512, 2049])
@pytest.mark.parametrize(("steps", "step_size"), [(1, 30), (3, 0.2), (10, 30), (7, 1), (100, 0.01)])
def test_equals_the_loop_over_vectors(dim: int, steps: int, step_size: float) -> None:
    rng = np.random.default_rng(dim)
    z = (rng.standard_normal((9, dim)) * np.logspace(-6, 6, 9)[:, None]).astype(np.float32)
    t = rng.standard_normal(dim).astype(np.float32)
    got = _core.purify_cos(z, t, steps=steps, step_size=step_size)
    assert relative_error(got, purify_by_steps(z, t, steps, step_size)) < 2e-6


def test_norms_do_not_change() -> None:
    rng = np.random.default_rng(0)
    z = (rng.standard_normal((7, 64)) * np.logspace(-30, 30, 7)[:, None]).astype(np.float32)
    got = _core.purify_cos(z, z[0] + z[1] * np.float32(1e10), steps=3, step_size=30.0)
    norms = [np.linalg.norm(a.astype(np.float64), axis=1) for a in (got, z)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


@pytest.mark.parametrize("degrees", [0.1, 5.0, 45.0, 75.0, 88.0])
@pytest.mark.parametrize("steps", [2, 10, 100])
def test_an_even_number_of_published_steps_is_the_identity(degrees: float, steps: int) -> None:
    z, t = at_angle(degrees, 512)
    got = _core.purify_cos(z, t, steps=steps, step_size=30.0)
    assert relative_error(got, z) < 1e-5
    odd = _core.purify_cos(z, t, steps=steps + 1, step_size=30.0)
    assert relative_error(odd, z) > 1e-3


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0, -0.3, 1e20])
@pytest.mark.parametrize("steps", [1, 10])
def test_embeddings_parallel_to_the_null_text_do_not_change(factor: float, steps: int) -> None:
    _, t = at_angle(90, 96)
    z = (t * np.float32(factor))[None]
    np.testing.assert_array_equal(_core.purify_cos(z, t, steps=steps, step_size=30.0), z)


def test_min_sine_is_the_smallest_that_moves() -> None:
    t = np.array([1.0, 0.0], np.float32)
    for factor in (0.99, 1.01):
        z = np.array([[1.0, factor * _core.MIN_SINE]], np.float32)
        got = _core.purify_cos(z, t, steps=1, step_size=30.0)
        assert np.array_equal(got, z) == (factor < 1)


def test_one_dimension_has_no_tangent() -> None:
    z = np.array([[2.0], [-3.0]], np.float32)
    t = np.ones(1, np.float32)
    np.testing.assert_array_equal(_core.purify_cos(z, t, steps=5, step_size=30.0), z)


def test_a_step_onto_the_null_text_stays_there() -> None:
    z, t = at_angle(45, 64)
    got = _core.purify_cos(z, t, steps=9, step_size=1.0)
    assert relative_error(got, t[None]) < 2e-5


@pytest.mark.parametrize(("steps", "step_size"), [(0, 30.0), (5, 0.0)])
def test_no_steps_or_step_size_zero_is_the_identity(steps: int, step_size: float) -> None:
    z, t = at_angle(70, 33)
    got = _core.purify_cos(z, t, steps=steps, step_size=step_size)
    assert relative_error(got, z) < 1e-7


def test_a_huge_step_size_turns_by_a_right_angle() -> None:
    z, t = at_angle(100, 33)
    got = _core.purify_cos(z, t, steps=1, step_size=1e300)
    assert np.degrees(np.arccos(got[0] @ t)) == pytest.approx(10, abs=1e-3)


def test_alone_and_in_a_batch() -> None:
    rng = np.random.default_rng(2)
    z = rng.standard_normal((9, 77)).astype(np.float32)
    t = rng.standard_normal(77).astype(np.float32)
    batch = _core.purify_cos(z, t, steps=3, step_size=0.5)
    for i in range(len(z)):
        alone = _core.purify_cos(z[i : i + 1], t, steps=3, step_size=0.5)
        np.testing.assert_array_equal(alone[0], batch[i])


def test_the_output_can_be_the_input() -> None:
    z, t = at_angle(70, 33)
    expected = _core.purify_cos(z, t, steps=3, step_size=0.5)
    assert _core.purify_cos(z, t, steps=3, step_size=0.5, out=z) is z
    np.testing.assert_array_equal(z, expected)


def test_many_rows() -> None:
    z = np.random.default_rng(0).standard_normal((20000, 512)).astype(np.float32)
    got = _core.purify_cos(z, z[0] + z[1], steps=1, step_size=30.0)
    np.testing.assert_array_equal(
        got[-3:], _core.purify_cos(z[-3:], z[0] + z[1], steps=1, step_size=30.0)
    )


def test_no_rows_and_read_only_arrays() -> None:
    t = np.ones(5, np.float32)
    t.setflags(write=False)
    empty = np.empty((0, 5), np.float32)
    empty.setflags(write=False)
    got = _core.purify_cos(empty, t, steps=1, step_size=1.0)
    assert got.shape == (0, 5)
    assert got.dtype == np.float32


Z = np.eye(3, 4, dtype=np.float32)
T = np.ones(4, np.float32)


def with_value(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"embeddings": Z.astype(np.float16)},
            "expected embeddings (N, D) float32, got (3, 4) float16",
        ),
        ({"embeddings": Z[0]}, "expected embeddings (N, D) float32, got (4,) float32"),
        ({"embeddings": Z[:, :0]}, "expected embeddings with D >= 1, got (3, 0)"),
        (
            {"embeddings": np.asfortranarray(Z)},
            "expected embeddings to be C-contiguous, got strides (4, 12) for shape (3, 4)",
        ),
        ({"null_text": T[:3]}, "expected null_text (4,) float32, got (3,) float32"),
        ({"null_text": T.astype(float)}, "expected null_text (4,) float32, got (4,) float64"),
        (
            {"null_text": np.ones(8, np.float32)[::2]},
            "expected null_text to be C-contiguous, got strides (8,) for shape (4,)",
        ),
        ({"steps": -1}, "expected steps >= 0, got -1"),
        ({"step_size": -0.5}, "expected a finite step_size >= 0, got -0.500000"),
        ({"step_size": float("inf")}, "expected a finite step_size >= 0, got inf"),
        ({"step_size": float("nan")}, "expected a finite step_size >= 0, got nan"),
        ({"embeddings": with_value(Z, (2, 3), np.nan)}, "embedding 2 contains NaN or infinity"),
        ({"embeddings": with_value(Z, (1, 0), -np.inf)}, "embedding 1 contains NaN or infinity"),
        ({"embeddings": with_value(Z, (1, 1), 0)}, "embedding 1 is zero"),
        ({"null_text": T * 0}, "null_text is zero"),
        ({"null_text": with_value(T, (0,), np.nan)}, "null_text contains NaN or infinity"),
    ],
)
def test_wrong_argumentsare_refused(change: dict, message: str) -> None:
    arguments = {"embeddings": Z, "null_text": T, "steps": 2, "step_size": 30.0, **change}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        _core.purify_cos(arguments.pop("embeddings"), arguments.pop("null_text"), **arguments)
    assert str(error.value) == "[purify_cos] " + message


# Step of CLIPure-Diff.


def rows_of_all_sizes(n: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = np.logspace(-20, 20, n)[:, None] if n else np.empty((0, 1))
    rows = rng.standard_normal((n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) * sizes).astype(np.float32)


@pytest.mark.parametrize("step_size", [0.0, 0.01, 0.5, 30.0])
@pytest.mark.parametrize("n", [0, 1, 33])
@pytest.mark.parametrize("dim", [1, 33, 2049])
def test_polar_step_equals_vectors(dim: int, n: int, step_size: float) -> None:
    z, g = rows_of_all_sizes(n, dim, 0), rows_of_all_sizes(n, dim, 1)[::-1].copy()
    copies = z.copy(), g.copy()
    got = _core.polar_step(z, g, step_size=step_size)
    assert got.dtype == np.float32
    assert got.shape == z.shape
    assert relative_error(got, polar_by_vectors(z, g, step_size)) < 1e-6
    norms = [np.linalg.norm(a.astype(np.float64), axis=1) for a in (got, z)]
    np.testing.assert_allclose(*norms, rtol=1e-6)
    assert np.array_equal(z, copies[0])
    assert np.array_equal(g, copies[1])


def test_polar_step_goes_down_the_gradient() -> None:
    z = np.array([[3.0, 0.0]], np.float32)
    got = _core.polar_step(z, np.array([[0.0, 1e-9]], np.float32), step_size=1.0)
    np.testing.assert_allclose(got, [[3 * 0.5**0.5, -3 * 0.5**0.5]], rtol=1e-6)


@pytest.mark.parametrize("step_size", [0.0, 0.5, 30.0])
def test_polar_step_without_a_gradient(step_size: float) -> None:
    z = rows_of_all_sizes(5, 33, 0)
    g = rows_of_all_sizes(5, 33, 1)
    g[[0, 3]] = 0
    got = _core.polar_step(z, g, step_size=step_size)
    assert np.array_equal(got[[0, 3]], z[[0, 3]])
    assert (np.array_equal(got[1], z[1])) is (step_size == 0)


def test_polar_step_onto_or_past_the_origin() -> None:
    z = rows_of_all_sizes(3, 33, 0)
    g = z.copy()
    g[1] *= -1
    exact = z.astype(np.float64)
    got = _core.polar_step(z, g, step_size=1.0)
    assert np.array_equal(got[[0, 2]], z[[0, 2]])
    assert relative_error(got[1:2], exact[1:2]) < 1e-6
    beyond = _core.polar_step(z, g, step_size=2.0)
    assert relative_error(beyond[[0, 2]], -exact[[0, 2]]) < 1e-6


@pytest.mark.parametrize("step_size", [1e30, 1e160, 1e300])
def test_polar_step_of_a_huge_size(step_size: float) -> None:
    z, g = rows_of_all_sizes(9, 33, 0), rows_of_all_sizes(9, 33, 1)
    got = _core.polar_step(z, g, step_size=step_size)
    exact = g.astype(np.float64)
    norms = [np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (z, g)]
    assert relative_error(got, -norms[0] * exact / norms[1]) < 1e-6


def test_polar_step_alone_and_in_a_batch() -> None:
    z, g = rows_of_all_sizes(33, 33, 0), rows_of_all_sizes(33, 33, 1)
    together = _core.polar_step(z, g, step_size=0.3)
    for i in range(33):
        row = slice(i, i + 1)
        assert np.array_equal(_core.polar_step(z[row], g[row], step_size=0.3), together[row])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": Z.astype(float)}, "expected embeddings (N, D) float32, got (3, 4) float64"),
        ({"embeddings": Z[0]}, "expected embeddings (N, D) float32, got (4,) float32"),
        ({"embeddings": Z[:, :0]}, "expected embeddings with D >= 1, got (3, 0)"),
        (
            {"embeddings": np.asfortranarray(Z)},
            "expected embeddings to be C-contiguous, got strides (4, 12) for shape (3, 4)",
        ),
        ({"gradients": Z[:2]}, "expected gradients (3, 4) float32, got (2, 4) float32"),
        ({"gradients": Z[:, :3].copy()}, "expected gradients (3, 4) float32, got (3, 3) float32"),
        ({"gradients": Z[0]}, "expected gradients (3, 4) float32, got (4,) float32"),
        (
            {"gradients": Z.astype(np.float16)},
            "expected gradients (3, 4) float32, got (3, 4) float16",
        ),
        (
            {"gradients": np.ones((6, 4), np.float32)[::2]},
            "expected gradients to be C-contiguous, got strides (32, 4) for shape (3, 4)",
        ),
        ({"step_size": -0.5}, "expected a finite step_size >= 0, got -0.500000"),
        ({"step_size": float("inf")}, "expected a finite step_size >= 0, got inf"),
        ({"step_size": float("nan")}, "expected a finite step_size >= 0, got nan"),
        ({"embeddings": with_value(Z, (2, 3), np.nan)}, "embedding 2 contains NaN or infinity"),
        ({"embeddings": with_value(Z, (1, 0), -np.inf)}, "embedding 1 contains NaN or infinity"),
        ({"embeddings": Z * np.float32(0)}, "embedding 0 is zero"),
        ({"gradients": with_value(Z, (2, 3), np.nan)}, "gradient 2 contains NaN or infinity"),
        ({"gradients": with_value(Z, (1, 0), np.inf)}, "gradient 1 contains NaN or infinity"),
    ],
)
def test_polar_step_refuses_wrong_arguments(change: dict, message: str) -> None:
    arguments = {"embeddings": Z, "gradients": np.ones_like(Z), "step_size": 0.5, **change}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        _core.polar_step(
            arguments["embeddings"], arguments["gradients"], step_size=arguments["step_size"]
        )
    assert str(error.value) == "[polar_step] " + message
