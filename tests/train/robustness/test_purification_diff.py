"""CLIPure-Diff in PyTorch, and its gradients, against a float64 loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeclip.purify import DiffPurifier, Purifier
from tests.support.models.clipure_reference import polar_by_vectors, relative_error
from tests.support.models.toy_models import null_prior
from tests.support.robustness.purification import problem
from train.robustness.purification import PURIFIER_GRADIENTS, NullPrior, purify

STEADY = DiffPurifier(3, 0.3, (0, 999), 5)


def diff_by_steps(
    z: np.ndarray,
    prior: NullPrior,
    purifier: DiffPurifier,
    gradients: list[np.ndarray] | None = None,
) -> np.ndarray:
    """Run the published loop in float64; an empty `gradients` is filled, a filled one followed."""
    random = np.random.RandomState(purifier.seed)
    times = random.randint(purifier.timesteps[0], purifier.timesteps[1] + 1, purifier.steps)
    noise = random.standard_normal((purifier.steps, z.shape[1])).astype(np.float32)
    replay = bool(gradients)
    for i in range(purifier.steps):
        if replay:
            gradient = gradients[i]
        else:
            unit = torch.from_numpy(z / np.linalg.norm(z, axis=1, keepdims=True))
            gradient = prior.gradient(unit, int(times[i]), torch.from_numpy(noise[i])).numpy()
            if gradients is not None:
                gradients.append(gradient)
        z = polar_by_vectors(z, gradient, purifier.step_size)
    return z


def diff(z: torch.Tensor, prior: NullPrior, mode: str, purifier: Purifier = STEADY) -> torch.Tensor:
    return purify(z, torch.zeros(z.shape[1]), purifier, mode, prior)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
@pytest.mark.parametrize("dim", [6, 33])
@pytest.mark.parametrize(
    "purifier",
    [STEADY, DiffPurifier(10, 30.0), DiffPurifier(0, 30.0), DiffPurifier(2, 0.0)],
    ids=str,
)
def test_diff_has_the_values_of_the_loop_in_every_mode(
    purifier: DiffPurifier, dim: int, mode: str, exact: bool
) -> None:
    z, _ = problem(5, dim)
    prior = null_prior(dim, exact=exact)
    before = z.clone()
    purified = diff(z, prior, mode, purifier)
    expected = diff_by_steps(z.numpy(), prior, purifier)
    assert relative_error(purified.numpy(), expected) < 1e-8
    torch.testing.assert_close(purified.norm(dim=1), z.norm(dim=1), rtol=1e-9, atol=0)
    assert torch.equal(z, before)


def test_diff_in_float32() -> None:
    z, _ = problem(5, 33)
    prior = null_prior(33)
    expected = diff(z, prior, "exact")
    purified = diff(z.float(), prior.float(), "exact")
    assert purified.dtype == torch.float32
    assert relative_error(purified.numpy(), expected.numpy()) < 1e-4


def diff_pull_back(
    z: torch.Tensor, prior: NullPrior, mode: str, incoming: torch.Tensor
) -> torch.Tensor:
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(diff(z, prior, mode), z, incoming)
    return gradient


def finite_differences(function: Any, z: torch.Tensor, incoming: torch.Tensor) -> np.ndarray:
    """Return the gradient of `incoming` (B, D) by central differences of each value of z."""
    columns = []
    for axis in np.eye(z.shape[1]):
        step = 1e-6 * np.linalg.norm(z.numpy(), axis=1, keepdims=True)
        apart = function(z.numpy() + step * axis) - function(z.numpy() - step * axis)
        columns.append((apart * incoming.numpy()).sum(1) / (2 * step[:, 0]))
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module")
def incoming() -> torch.Tensor:
    return torch.randn(3, 9, generator=torch.Generator().manual_seed(7)).double()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "forward"])
def test_exact_gradient_of_diff_equals_finite_differences(
    incoming: torch.Tensor, exact: bool
) -> None:
    """Compare the forward gradient of a bundle too, which is another function."""
    z, _ = problem(3, 9)
    prior = null_prior(9, exact=exact)
    gradient = diff_pull_back(z, prior, "exact", incoming)
    expected = finite_differences(lambda x: diff_by_steps(x, prior, STEADY), z, incoming)
    assert relative_error(gradient.numpy(), expected) < 1e-5


def test_released_gradient_of_diff_treats_the_directions_as_constants(
    incoming: torch.Tensor,
) -> None:
    z, _ = problem(3, 9)
    prior = null_prior(9)
    gradients: list[np.ndarray] = []
    diff_by_steps(z.numpy(), prior, STEADY, gradients)
    gradient = diff_pull_back(z, prior, "released", incoming)
    expected = finite_differences(lambda x: diff_by_steps(x, prior, STEADY, gradients), z, incoming)
    assert relative_error(gradient.numpy(), expected) < 1e-6
    exact = diff_pull_back(z, prior, "exact", incoming)
    assert relative_error(gradient.numpy(), exact.numpy()) > 1e-3


def test_identity_gradient_of_diff_equals_the_incoming_one(incoming: torch.Tensor) -> None:
    z, _ = problem(3, 9)
    assert torch.equal(diff_pull_back(z, null_prior(9), "identity", incoming), incoming)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_diff_alone_and_in_a_batch(mode: str) -> None:
    z, _ = problem(33, 9)
    prior = null_prior(9)
    incoming = torch.randn(33, 9, generator=torch.Generator().manual_seed(0)).double()
    together = diff(z, prior, mode), diff_pull_back(z, prior, mode, incoming)
    for i in (0, 7, 32):
        row = slice(i, i + 1)
        alone = diff(z[row], prior, mode), diff_pull_back(z[row], prior, mode, incoming[row])
        for actual, expected in zip(alone, together, strict=True):
            assert relative_error(actual.numpy(), expected[row].numpy()) < 1e-8


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_diff_without_a_gradient_stays(mode: str) -> None:
    class Flat(torch.nn.Module):
        def gradient(self, unit: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
            return 0 * unit

    z, _ = problem(3, 9)
    assert relative_error(diff(z, Flat(), mode).numpy(), z.numpy()) < 1e-12
    assert diff_pull_back(z, Flat(), mode, torch.ones_like(z)).isfinite().all()


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_diff_of_no_embeddings(mode: str) -> None:
    assert diff(torch.empty(0, 9).double(), null_prior(9), mode).shape == (0, 9)


@pytest.mark.parametrize("mode", PURIFIER_GRADIENTS)
def test_diff_needs_a_prior(mode: str) -> None:
    with pytest.raises(ValueError, match="CLIPure-Diff needs a prior"):
        purify(torch.ones(1, 9), torch.ones(9), STEADY, mode)


def test_weights_of_the_prior_are_left_alone(incoming: torch.Tensor) -> None:
    z, _ = problem(3, 9)
    prior = null_prior(9)
    diff_pull_back(z, prior, "exact", incoming)
    assert all(p.grad is None for p in prior.parameters())
    names = set(prior.state_dict())
    assert "memory" not in names
    assert {"memory", "mask"} <= {name for name, _ in prior.named_buffers()}
