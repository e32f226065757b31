"""Embeddings to purify, and gradients through the purification."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from edgeclip.purify import CosPurifier
from train.robustness.purification import purify

DIMS = [2, 33, 2049]
# Small steps, steps beyond the null text and back, and no steps.
SETTINGS = [(1, 30.0), (9, 30.0), (10, 30.0), (3, 0.2), (7, 1.0), (100, 0.01), (0, 30.0), (5, 0.0)]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-11}


def problem(
    n: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings of various norms, and a null text of norm 1."""
    rng = torch.Generator().manual_seed(1000 * dim + seed)
    z = torch.randn(n, dim, generator=rng, dtype=torch.float64)
    z = z * torch.logspace(-3, 3, n, dtype=torch.float64)[:, None]
    t = F.normalize(torch.randn(dim, generator=rng, dtype=torch.float64), dim=0)
    return z.to(dtype), t.to(dtype)


def at_angle(
    degrees: float, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Return unit u (1, D) at an angle to the unit null text t, with t and the unit tangent w at t."""
    rng = np.random.default_rng(seed)
    t, w = torch.from_numpy(np.linalg.qr(rng.standard_normal((dim, 2)))[0].T.copy())
    radians = np.radians(degrees)
    u = (np.cos(radians) * t + np.sin(radians) * w)[None]
    return u.to(dtype), t.to(dtype), w.to(dtype)


def pull_back(
    z: torch.Tensor, t: torch.Tensor, purifier: CosPurifier, mode: str, incoming: torch.Tensor
) -> torch.Tensor:
    """Return the gradient that the backward pass makes of `incoming`."""
    z = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(purify(z, t, purifier, mode), z, incoming)
    return gradient
