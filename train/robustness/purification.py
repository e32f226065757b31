"""CLIPure in PyTorch, with a choice of gradients for attacks.

The equations are those of CLIPure (Zhang et al., ICLR 2025, arXiv 2502.18176, section 4), for each
image separately. The values are the same for every gradient; only the backward pass differs:

exact     derivative of the purification; for CLIPure-Diff with known noise, and through the
          gradients of the prior's loss that its steps follow
identity  the purification is ignored (BPDA, Athalye et al., ICML 2018)
released  derivative of the published loop, which detaches the direction of each step. The rest of
          the gradient shrinks by the length of each step, until only rounding errors remain: an
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

PURIFIER_GRADIENTS = ("exact", "identity", "released")


class NullPrior(nn.Module):
    """Diffusion prior with its null text: the density that CLIPure-Diff climbs."""

    memory: Tensor
    mask: Tensor

    def __init__(self, prior: DiffusionPrior, context: Context, *, exact: bool = True) -> None:
        """Use the exact gradient of the loss, or the approximate one that a bundle may have."""
        super().__init__()
        self.prior, self.exact = prior, exact
        self.register_buffer("memory", context.memory, persistent=False)
        self.register_buffer("mask", context.mask, persistent=False)

    def gradient(self, unit: Tensor, timestep: int, noise: Tensor) -> Tensor:
        """Return the gradient of the prior's loss at unit embeddings (B, D), all with one noise (D,)."""
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
    """Return purified embeddings (B, D); they keep their norms, which may be any.

    CLIPure-Cos needs null_text (D,), CLIPure-Diff the prior. Raises ValueError for a gradient that is
    not one of PURIFIER_GRADIENTS, and for a missing prior.
    """
    if gradient not in PURIFIER_GRADIENTS:
        raise ValueError(
            f"gradient must be one of {', '.join(PURIFIER_GRADIENTS)}, got {gradient!r}"
        )
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
    """Return a u + b t by a recursion of two scalars per image, in float64: 1 / sine amplifies errors."""
    wide, text = embedding.double(), F.normalize(null_text.double(), dim=0)
    norm: Tensor = wide.norm(dim=1)
    start = (wide @ text / norm).clamp(-1, 1)
    apart = (1 - start) * (1 + start) > MIN_SINE**2
    start = torch.where(apart, start, 0)  # any differentiable value; these rows do not change
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
    """Run the published loop: each step changes the unit embedding and normalises it."""
    norm = embedding.norm(dim=1, keepdim=True)
    unit = embedding / norm
    for step in range(steps):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            move = change(unit, step)
        unit = F.normalize(unit + move, dim=1)
    purified: Tensor = norm * unit
    return purified
