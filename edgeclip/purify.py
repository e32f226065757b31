"""What a purification is: its parameters and their validation.

The arithmetic is in `_core`. How much it protects has to be measured; its name promises nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeclip.errors import BundleError

MAX_STEPS = 10_000  # far beyond any use, and still answered at once


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
        if not (isinstance(self.steps, int) and 0 <= self.steps <= MAX_STEPS):
            raise ValueError(f"purification steps must be 0 to {MAX_STEPS}, got {self.steps}")
        if not (math.isfinite(self.step_size) and self.step_size >= 0):
            raise ValueError(f"purification step size must be 0 or more, got {self.step_size}")


Purifier = CosPurifier | None


def resolve(purify: str | Purifier, recommended: Purifier) -> Purifier:
    """The purifier that an option names: auto (the bundle's own), none, cos, or a purifier.

    Raises BundleError for diff, which needs a bundle with a prior; ValueError for any other name.
    """
    if purify is None or isinstance(purify, CosPurifier):
        return purify
    if purify == "auto":
        return recommended
    if purify == "none":
        return None
    if purify == "cos":
        return recommended or CosPurifier()
    if purify == "diff":
        raise BundleError("purify 'diff' needs a bundle with a diffusion prior; this one has none")
    raise ValueError(f"purify must be auto, none, cos or diff, got {purify!r}")
