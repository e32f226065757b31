"""Gradients of CLIPure-Cos against central differences and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgeclip.purify import CosPurifier
from tests.support.models.clipure_reference import purify_by_steps, relative_error
from tests.support.robustness.purification import DIMS, SETTINGS, at_angle, problem, pull_back
from train.robustness.purification import purify


@pytest.mark.parametrize(("steps", "step_size"), SETTINGS)
@pytest.mark.parametrize("dim", [2, 5, 33])
def test_exact_gradient_equals_finite_differences(steps: int, step_size: float, dim: int) -> None:
    """Compare with central differences of the float64 loop over vectors."""
    rng = np.random.default_rng(dim)
    # No step ends on the null text, where there is no derivative.
    angles = [20, 50, 80, 100, 130, 160]
    rows = [at_angle(x, dim, torch.float64, seed=dim) for x in angles]
    z, t = (
        torch.cat([u for u, _, _ in rows]).numpy() * rng.uniform(0.5, 5, (6, 1)),
        rows[0][1].numpy(),
    )
    incoming = rng.standard_normal((6, dim))
    gradient = pull_back(
        torch.from_numpy(z), torch.from_numpy(t), CosPurifier(steps, step_size), "exact",
        torch.from_numpy(incoming),
    )  # fmt: skip
    expected, h = np.empty_like(z), 1e-6
    for j in range(dim):
        moved = np.zeros(dim)
        moved[j] = h
        up, down = (purify_by_steps(z + s * moved, t, steps, step_size) for s in (1, -1))
        expected[:, j] = (incoming * (up - down)).sum(1) / (2 * h)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("steps", "step_size"), SETTINGS)
def test_exact_mode_passes_gradcheck(steps: int, step_size: float) -> None:
    rng = torch.Generator().manual_seed(3)
    z = torch.randn(4, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    t = torch.randn(6, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: purify(z, t, CosPurifier(steps, step_size), "exact"), z, atol=1e-6
    )


@pytest.mark.parametrize("dim", DIMS)
def test_exact_gradient_in_float32_is_the_one_in_float64(dim: int) -> None:
    z, t = problem(33, dim)
    for steps, step_size in [(9, 30.0), (10, 30.0), (3, 0.2)]:
        purifier = CosPurifier(steps, step_size)
        incoming = torch.randn(33, dim, generator=torch.Generator().manual_seed(0))
        wide = pull_back(z, t, purifier, "exact", incoming.double())
        gradient = pull_back(z.float(), t.float(), purifier, "exact", incoming)
        assert gradient.dtype == torch.float32
        # In two dimensions some embeddings are nearly parallel to the null text.
        tolerance = 2e-3 if dim == 2 else 2e-5
        assert relative_error(gradient.double().numpy(), wide.numpy()) < tolerance, (
            steps,
            step_size,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", DIMS)
def test_identity_hands_the_gradient_on_untouched(dim: int, dtype: torch.dtype) -> None:
    z, t = problem(9, dim, dtype)
    incoming = torch.randn(9, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for steps, step_size in SETTINGS:
        gradient = pull_back(z, t, CosPurifier(steps, step_size), "identity", incoming)
        assert torch.equal(gradient, incoming)


@pytest.mark.parametrize(("steps", "step_size"), [(1, 30.0), (2, 3.0), (4, 30.0), (10, 30.0)])
@pytest.mark.parametrize("degrees", [20.0, 75.0])
def test_released_gradient_shrinks_by_the_length_of_each_step(
    degrees: float, steps: int, step_size: float
) -> None:
    """Measure the shrinking across the plane of u and t, and within it, where each step also turns."""
    u, t, w = at_angle(degrees, 64, torch.float64)
    purifier = CosPurifier(steps, step_size)
    out = purify(u, t, purifier, "exact")
    sines = [torch.dot(x[0], w).item() for x in (u, out)]
    rng = torch.Generator().manual_seed(0)
    across = torch.randn(1, 64, generator=rng, dtype=torch.float64)
    across -= (across @ t)[:, None] * t + (across @ w)[:, None] * w
    exact = pull_back(u, t, purifier, "exact", across)
    torch.testing.assert_close(exact, across * (sines[1] / sines[0]), rtol=1e-9, atol=1e-12)
    shrunk = np.hypot(1, step_size) ** -steps
    released = pull_back(u, t, purifier, "released", across)
    assert (released.norm() / across.norm()).item() == pytest.approx(shrunk, rel=1e-2)
    cosine = (released * across).sum() / (released.norm() * across.norm())
    assert cosine.item() == pytest.approx(1, abs=1e-2)

    end = torch.dot(out[0], t) * w - sines[1] * t  # the direction of a turn at u_N, from t to w
    exact = pull_back(u, t, purifier, "exact", end[None])
    assert exact.norm().item() == pytest.approx(1, rel=1e-9)
    if shrunk**2 > 1e-14:
        released = pull_back(u, t, purifier, "released", end[None])
        assert released.norm().item() == pytest.approx(shrunk**2, rel=1e-2)


def test_published_released_gradient_is_rounding() -> None:
    """Show that the released gradient is tiny, and that its direction is noise, in float32."""
    z, t = problem(33, 512, torch.float32)
    incoming = torch.randn(33, 512, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(purify(z, t, CosPurifier(), "exact"), dim=1)
    incoming -= (incoming * unit).sum(1, keepdim=True) * unit  # the norm does not change
    rows = {mode: pull_back(z, t, CosPurifier(), mode, incoming) for mode in ("exact", "released")}
    assert (rows["released"].norm(dim=1) < 1e-5 * rows["exact"].norm(dim=1)).all()
