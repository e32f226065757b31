"""CLIPure-Cos in PyTorch against the released code, the core and a float64 loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeclip import _core
from edgeclip.purify import CosPurifier
from tests.support.models.clipure_reference import GOLDEN, purify_by_steps, relative_error
from tests.support.robustness.purification import (
    DIMS,
    SETTINGS,
    TOLERANCE,
    at_angle,
    problem,
    pull_back,
)
from train.robustness.purification import PURIFIER_GRADIENTS, purify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_golden_values(mode: str, dtype: torch.dtype) -> None:
    golden = np.load(GOLDEN)
    z, t = torch.from_numpy(golden["z"]).to(dtype), torch.from_numpy(golden["t"]).to(dtype)
    for i, steps in enumerate(golden["steps"]):
        for j, step_size in enumerate(golden["step_sizes"]):
            purified = purify(z, t, CosPurifier(int(steps), float(step_size)), mode)
            assert purified.dtype == dtype
            # The first of several steps may end near the null text, and then magnifies rounding.
            tolerance = 5e-5 if (mode, dtype) == ("released", torch.float32) else 1e-5
            error = relative_error(purified.numpy(), golden["purified"][i, j])
            assert error < tolerance, (steps, step_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("steps", "step_size"), SETTINGS)
def test_every_mode_has_the_values_of_the_loop_and_of_the_core(
    steps: int, step_size: float, dim: int, mode: str, dtype: torch.dtype
) -> None:
    z, t = problem(9, dim, dtype)
    # The null text's norm does not matter.
    purified = purify(z, t * 3, CosPurifier(steps, step_size), mode)
    expected = purify_by_steps(z.numpy(), t.numpy(), steps, step_size)
    # The loop rounds at every step, more when a step ends near the null text.
    tolerance = TOLERANCE[dtype] * (200 if mode == "released" else 1)
    assert purified.shape == z.shape
    assert purified.dtype == dtype
    assert relative_error(purified.numpy(), expected) < tolerance
    if dtype == torch.float32:
        core = _core.purify_cos(z.numpy(), t.numpy(), steps=steps, step_size=step_size)
        assert relative_error(purified.numpy(), core) < tolerance


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("degrees", [1.0, 30.0, 75.0, 87.9])
@pytest.mark.parametrize("steps", [2, 9, 10, 11])
def test_published_steps_do_nothing_if_even_and_reflect_if_odd(
    steps: int, degrees: float, mode: str
) -> None:
    u, t, _ = at_angle(degrees, 512, torch.float64)
    purified = purify(7 * u, t, CosPurifier(steps, 30.0), mode)
    if steps % 2 == 0:
        torch.testing.assert_close(purified, 7 * u, rtol=0, atol=1e-10)
        return
    overshoot = np.radians(np.degrees(np.arctan(30.0)) - degrees)  # beyond t, on the other side
    assert torch.dot(purified[0] / 7, t).item() == pytest.approx(np.cos(overshoot), abs=1e-10)
    w = (u - (u @ t)[:, None] * t)[0]
    assert torch.dot(purified[0] / 7, w / w.norm()).item() == pytest.approx(
        -np.sin(overshoot), abs=1e-10
    )


@pytest.mark.parametrize("degrees", [10.0, 40.0])
@pytest.mark.parametrize("steps", [1, 9])
def test_an_odd_number_of_steps_of_twice_the_angle_is_the_reflection(
    steps: int, degrees: float
) -> None:
    u, t, _ = at_angle(degrees, 64, torch.float64)
    purified = purify(u, t, CosPurifier(steps, float(np.tan(np.radians(2 * degrees)))), "exact")
    torch.testing.assert_close(purified, 2 * (u @ t)[:, None] * t - u, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("steps", [1, 9])
def test_a_step_onto_the_null_text_stays_there(steps: int, mode: str) -> None:
    u, t, _ = at_angle(75.0, 64, torch.float64)
    purified = purify(u, t, CosPurifier(steps, float(np.tan(np.radians(75)))), mode)
    torch.testing.assert_close(purified, t[None], rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize(("steps", "step_size"), SETTINGS)
def test_norms_are_kept(steps: int, step_size: float, mode: str, dtype: torch.dtype) -> None:
    z, t = problem(33, 65, dtype)
    purified = purify(z, t, CosPurifier(steps, step_size), mode)
    torch.testing.assert_close(purified.norm(dim=1), z.norm(dim=1), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("steps", [1, 2, 9, 10])
@pytest.mark.parametrize("degrees", [2e-3, 0.01, 0.1, 1.0, 179.0, 179.99])
def test_norms_are_kept_near_the_null_text(degrees: float, steps: int, mode: str) -> None:
    """Purify where 1 / sine is large, and would amplify the rounding of a norm in float32."""
    u, t, _ = at_angle(degrees, 512, torch.float32)
    purified = purify(u, t, CosPurifier(steps, 30.0), mode)
    assert purified.norm().item() == pytest.approx(1, abs=1e-4)
    expected = purify_by_steps(u.numpy(), t.numpy(), steps, 30.0)
    # A direction known to 1e-7 determines the plane to this; the core is no better.
    known = 5e-6 + 3e-6 / np.sin(np.radians(degrees))
    if mode != "released":
        assert relative_error(purified.numpy(), expected) < known


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("dim", [*DIMS, 96])
def test_parallel_to_the_null_text_there_is_no_tangent(
    dim: int, steps: int, dtype: torch.dtype, mode: str
) -> None:
    factors = torch.tensor([1.0, -1.0, 3.0, -0.3, 1e4], dtype=dtype)
    purifier = CosPurifier(steps, 30.0)
    for seed in range(10):  # norms round differently
        _, t = problem(1, dim, dtype, seed)
        moving = torch.roll(t, 1) + t
        z = torch.cat([factors[:, None] * t, moving[None]])
        purified = purify(z, t, purifier, mode) / z.norm(dim=1, keepdim=True)
        expected = F.normalize(z, dim=1)
        atol = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(purified[:-1], expected[:-1], rtol=0, atol=atol)
        gradient = pull_back(z, t, purifier, mode, torch.ones_like(z))
        assert gradient.isfinite().all()
        if mode == "released":  # some of its terms are detached
            assert (gradient[:-1].norm(dim=1) <= 1.01 * dim**0.5).all()
        else:
            torch.testing.assert_close(gradient[:-1], torch.ones_like(z[:-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_null_text_to_the_last_bit(dtype: torch.dtype, mode: str) -> None:
    """Purify where the sine is 0: the backward pass must not divide by it."""
    t = torch.eye(33, dtype=dtype)[0]
    z = torch.stack([t, -t, 4 * t, -0.25 * t, t + torch.eye(33, dtype=dtype)[1]])
    for steps in (1, 10):
        purified = purify(z, t, CosPurifier(steps, 30.0), mode)
        assert torch.equal(purified[:-1], z[:-1])
        gradient = pull_back(z, t, CosPurifier(steps, 30.0), mode, torch.ones_like(z))
        assert gradient.isfinite().all()
        assert (gradient[:-1].norm(dim=1) <= 6).all()


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_one_dimension_has_no_tangent(mode: str) -> None:
    z = torch.tensor([[2.0], [-3.0]])
    purified = purify(z, torch.ones(1), CosPurifier(5, 30.0), mode)
    torch.testing.assert_close(purified, z)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize(("steps", "step_size"), [(10, 30.0), (9, 30.0), (3, 0.2)])
@pytest.mark.parametrize("dim", DIMS)
def test_alone_and_in_a_batch(dim: int, steps: int, step_size: float, mode: str) -> None:
    z, t = problem(33, dim)
    incoming = torch.randn(33, dim, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    purifier = CosPurifier(steps, step_size)
    together = purify(z, t, purifier, mode), pull_back(z, t, purifier, mode, incoming)
    for i in (0, 7, 32):
        row = slice(i, i + 1)
        alone = (
            purify(z[row], t, purifier, mode),
            pull_back(z[row], t, purifier, mode, incoming[row]),
        )
        for purified, expected in zip(alone, together, strict=True):
            assert relative_error(purified.numpy(), expected[row].numpy()) < 1e-9


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_no_embeddings(mode: str) -> None:
    assert purify(torch.empty(0, 5), torch.ones(5), CosPurifier(), mode).shape == (0, 5)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_inputs_are_left_alone(mode: str) -> None:
    z, t = problem(3, 33)
    before = z.clone(), t.clone()
    purify(z, t, CosPurifier(), mode)
    assert torch.equal(z, before[0])
    assert torch.equal(t, before[1])


@pytest.mark.parametrize("mode", ["encoder", "Exact", "", "none"])
def test_unknown_mode(mode: str) -> None:
    z, t = problem(1, 33)
    with pytest.raises(ValueError, match="gradient must be one of exact, identity, released"):
        purify(z, t, CosPurifier(), mode)
