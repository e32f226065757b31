"""Settings of purification: parameters, validation and random draws. The arithmetic is in `_core`.

The protection of a setting has to be measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import BundleError

MAX_STEPS = 10_000  # far beyond any use; CLIPure-Cos still answers at once
NO_PRIOR = (
    "purify 'diff' needs a bundle with a diffusion prior, and this one has none: "
    "export it with --prior"
)
MAX_TIMESTEP = 2**20
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class CosPurifier:
    """CLIPure-Cos: `steps` rotations of the image embedding towards the null text.

    Each step rotates by atan(step_size) (CLIPure, Zhang et al., ICLR 2025, arXiv 2502.18176,
    section 4). The defaults are the published setting. Raises ValueError for a negative number of
    steps, or a step size that is negative or not finite.
    """

    steps: int = 10
    step_size: float = 30.0

    def __post_init__(self) -> None:
        _check(self)

    def __str__(self) -> str:
        return f"cos {self.steps} x {self.step_size:g}"


@dataclass(frozen=True)
class DiffPurifier:
    """CLIPure-Diff: `steps` steps of size step_size up the likelihood under a diffusion prior.

    Each step draws a timestep from `timesteps` (first and last) and noise, and follows the direction
    of the gradient of the prior's loss (CLIPure, section 4). The draws depend on `seed` alone: they
    are equal for all images, in any batch. The defaults are the published setting.
    Raises ValueError for a number out of range.
    """

    steps: int = 10
    step_size: float = 30.0
    timesteps: tuple[int, int] = (900, 999)
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)
        times = self.timesteps
        whole = isinstance(times, tuple) and all(type(time) is int for time in times)
        if not (whole and len(times) == 2 and 0 <= times[0] <= times[1] <= MAX_TIMESTEP):
            raise ValueError(f"timesteps must be the first and the last, got {times!r}")
        if not (type(self.seed) is int and 0 <= self.seed <= MAX_SEED):
            raise ValueError(f"purification seed must be 0 to {MAX_SEED}, got {self.seed}")

    def __str__(self) -> str:
        text = f"diff {self.steps} x {self.step_size:g}"
        return text + " t {}-{} seed {}".format(*self.timesteps, self.seed)

    def draws(self, dim: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draw the timestep (steps,) and the noise (steps, dim) of each step."""
        # NumPy guarantees the same numbers in every version for this generator only.
        random = np.random.RandomState(self.seed)
        first, last = self.timesteps
        times = random.randint(first, last + 1, size=self.steps)
        noise = random.standard_normal((self.steps, dim))
        return times.astype(np.int64), noise.astype(np.float32)


Purifier = CosPurifier | DiffPurifier | None


def _check(purifier: CosPurifier | DiffPurifier) -> None:
    steps, step_size = purifier.steps, purifier.step_size
    if not (isinstance(steps, int) and 0 <= steps <= MAX_STEPS):
        raise ValueError(f"purification steps must be 0 to {MAX_STEPS}, got {steps}")
    if not (math.isfinite(step_size) and step_size >= 0):
        raise ValueError(f"purification step size must be 0 or more, got {step_size}")


def resolve(purify: str | Purifier, recommended: Purifier) -> Purifier:
    """Return the purifier for an option: auto, none, cos, diff, or a purifier itself.

    auto: the one that the bundle recommends. cos and diff: the same if it is of that kind, else the
    published setting. Raises ValueError for any other name.
    """
    if not isinstance(purify, str):
        return purify
    if purify == "auto":
        return recommended
    if purify == "none":
        return None
    for name, kind in (("cos", CosPurifier), ("diff", DiffPurifier)):
        if purify == name:
            return recommended if isinstance(recommended, kind) else kind()
    raise ValueError(f"purify must be auto, none, cos or diff, got {purify!r}")


def to_dict(purifier: Purifier) -> dict[str, Any] | None:
    """Return the JSON object of a purifier: `method` is its kind, omitted for CLIPure-Cos."""
    if purifier is None:
        return None
    method = {"method": "diff"} if isinstance(purifier, DiffPurifier) else {}
    return method | dataclasses.asdict(purifier)


def from_dict(data: Mapping[str, Any] | None) -> Purifier:
    """Return the purifier of a JSON object. Raises ValueError, TypeError or KeyError if malformed."""
    if data is None:
        return None
    steps, step_size = data["steps"], float(data["step_size"])
    method = data.get("method", "cos")
    if method == "cos":
        return CosPurifier(steps, step_size)
    if method != "diff":
        raise ValueError(f"unknown purification {method!r}")
    return DiffPurifier(steps, step_size, tuple(data["timesteps"]), data["seed"])


def check_prior(purifier: Purifier, timesteps: int | None) -> None:
    """Raise BundleError if a purifier needs a prior with more timesteps; None: without a prior."""
    if not isinstance(purifier, DiffPurifier):
        return
    if timesteps is None:
        raise BundleError(NO_PRIOR)
    if purifier.timesteps[1] >= timesteps:
        raise BundleError(
            f"the bundle's prior has the timesteps 0 to {timesteps - 1}, and {purifier.timesteps[1]} is "
            "none of them: name others with --timesteps, or as DiffPurifier(timesteps=...)"
        )
