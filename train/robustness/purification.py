"""CLIPure in PyTorch, with the gradient that an attack is to see through it.

The equations are those of CLIPure (Zhang et al., ICLR 2025, arXiv 2502.18176, section 4), for each
image by itself. The values are the same in every mode; only the backward pass differs:

exact     the derivative of the purification as the function that it is; of CLIPure-Diff, with its
          noise known, through the gradients of the prior's loss that it follows
identity  as if there were no purification (BPDA, Athalye et al., ICML 2018)
released  the published loop, which detaches the direction of each step. What is left of the
          gradient shrinks by the length of a step each time, until rounding is all there is: an
          attack that uses it measures masking, not robustness.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip._core import MIN_SINE
from edgeclip.purify import CosPurifier, DiffPurifier
from train.models.prior import Context, DiffusionPrior

PURIFIED = ("exact", "identity", "released")  # gradients through a purification


class NullPrior(nn.Module):
    """A diffusion prior and its null text: the density that CLIPure-Diff climbs."""

    memory: Tensor
    mask: Tensor

    def __init__(self, prior: DiffusionPrior, context: Context, *, exact: bool = True) -> None:
        """exact: by the gradient of the loss; else by the one that a bundle may have for it."""
        super().__init__()
        self.prior, self.exact = prior, exact
        self.register_buffer("memory", context.memory, persistent=False)
        self.register_buffer("mask", context.mask, persistent=False)

    def gradient(self, unit: Tensor, timestep: int, noise: Tensor) -> Tensor:
        """Of the loss of unit embeddings (B, D) with the same noise (D,), with respect to them."""
        times = torch.full(unit.shape[:1], timestep, device=unit.device)
        context = Context(self.memory, self.mask)
        same = noise.to(unit).expand_as(unit)
        return self.prior.score(unit, times, same, context, exact=self.exact)[1]


def purify(
    embedding: Tensor,
    null_text: Tensor,
    purifier: CosPurifier | DiffPurifier,
    gradient: str,
    prior: NullPrior | None = None,
) -> Tensor:
    """Embeddings (B, D) of any norm, purified; their norms stay. null_text (D,) is of CLIPure-Cos,
    the prior of CLIPure-Diff.

    Raises ValueError for a gradient that is not one of PURIFIED.
    """
    if gradient not in PURIFIED:
        raise ValueError(f"gradient must be one of {', '.join(PURIFIED)}, got {gradient!r}")
    if gradient == "identity":
        with torch.no_grad():
            change = purify(embedding, null_text, purifier, "exact", prior) - embedding
        return embedding + change
    if isinstance(purifier, DiffPurifier):
        if prior is None:
            raise ValueError("CLIPure-Diff needs a prior")
        return _climb(embedding, prior, purifier, detached=gradient == "released")
    if gradient == "exact":
        return _closed_form(embedding, null_text, purifier)
    return _detached_loop(embedding, null_text, purifier)


def _closed_form(embedding: Tensor, null_text: Tensor, purifier: CosPurifier) -> Tensor:
    """a u + b t by a recursion of two scalars per image, in float64 since 1 / sine amplifies."""
    wide, text = embedding.double(), F.normalize(null_text.double(), dim=0)
    norm = wide.norm(dim=1)
    start = (wide @ text / norm).clamp(-1, 1)
    apart = (1 - start) * (1 + start) > MIN_SINE**2
    start = torch.where(apart, start, 0)  # any value with a derivative; these rows stay as they are
    start_sine = ((1 - start) * (1 + start)).sqrt()
    length = (1 + purifier.step_size**2) ** 0.5
    turn_cosine, turn_sine = 1 / length, purifier.step_size / length
    cosine, sine = start, start_sine
    for _ in range(purifier.steps):
        side = torch.where(sine < 0, -1.0, 1.0)
        distance = sine * side
        moving = distance >= MIN_SINE
        turned = side * (distance * turn_cosine - cosine * turn_sine)
        cosine = torch.where(moving, cosine * turn_cosine + distance * turn_sine, cosine)
        sine = torch.where(moving, turned, sine)
    a = torch.where(apart, sine / start_sine, 1)
    b = torch.where(apart, cosine - a * start, 0)
    return (a[:, None] * wide + (b * norm)[:, None] * text).to(embedding)


def _detached_loop(embedding: Tensor, null_text: Tensor, purifier: CosPurifier) -> Tensor:
    text = F.normalize(null_text, dim=0)

    def towards(unit: Tensor, _: int) -> Tensor:
        tangent = text - (unit @ text)[:, None] * unit
        sine = tangent.norm(dim=1, keepdim=True)
        return torch.where(sine >= MIN_SINE, purifier.step_size * tangent / sine, 0)

    return _loop(embedding, purifier.steps, towards, detached=True)


def _climb(
    embedding: Tensor, prior: NullPrior, purifier: DiffPurifier, *, detached: bool
) -> Tensor:
    times, noise = purifier.draws(embedding.shape[1])

    def downhill(unit: Tensor, step: int) -> Tensor:
        gradient = prior.gradient(unit, int(times[step]), torch.from_numpy(noise[step]))
        return -purifier.step_size * F.normalize(gradient, dim=1, eps=1e-30)

    return _loop(embedding, purifier.steps, downhill, detached=detached)


def _loop(
    embedding: Tensor,
    steps: int,
    change: Callable[[Tensor, int], Tensor],
    *,
    detached: bool,
) -> Tensor:
    """The published loop: a change of the unit embedding in each step, and normalisation."""
    norm = embedding.norm(dim=1, keepdim=True)
    unit = embedding / norm
    for step in range(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            move = change(unit, step)
        unit = F.normalize(unit + move, dim=1)
    return norm * unit
