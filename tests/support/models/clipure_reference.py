"""CLIPure-Cos written out in NumPy, float64."""

from __future__ import annotations

import numpy as np

from tests.support.paths import VECTORS

GOLDEN = VECTORS / "clipure_cos.npz"


def purify_by_steps(
    embeddings: np.ndarray, null_text: np.ndarray, steps: int, step_size: float
) -> np.ndarray:
    """Run the published loop over whole vectors, in float64."""
    z, t = embeddings.astype(np.float64), null_text.astype(np.float64)
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    u, t = z / norms, t / np.linalg.norm(t)
    for _ in range(steps):
        tangent = t - (u @ t)[:, None] * u
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        u = (u + step_size * tangent) / np.hypot(1, step_size)
        u /= np.linalg.norm(u, axis=1, keepdims=True)
    return u * norms


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(error.max(initial=0))


def polar_by_vectors(z: np.ndarray, g: np.ndarray, step_size: float) -> np.ndarray:
    """Take one published step of CLIPure-Diff over whole vectors, in float64."""
    z, g = z.astype(np.float64), g.astype(np.float64)
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    moved = z / norms - step_size * g / np.linalg.norm(g, axis=1, keepdims=True)
    return norms * moved / np.linalg.norm(moved, axis=1, keepdims=True)
