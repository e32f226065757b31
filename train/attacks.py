"""Gradient attacks on images in [0, 1], as pure functions of a logits function.

Gradients are taken with respect to the image alone: the weights' .grad does not change. Attacks run
in the dtype of the images. float16 is refused: its gradients underflow, the attack fails, and the
failure looks like robustness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Loss = Callable[[Any, torch.Tensor], torch.Tensor]  # (logits, labels) -> (B,)
Fooled = Callable[[Any, torch.Tensor], torch.Tensor]  # (logits, labels) -> (B,) booleans
# One generator for all images, or one for each: then no image's noise depends on the others.
Generators = torch.Generator | Sequence[torch.Generator] | None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy (B,), the loss of PGD (Madry et al., ICLR 2018)."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the best wrong logit minus the right one, (B,) (Carlini and Wagner, 2017).

    Above 0 the attack has succeeded.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    logits = _wide(logits)
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Convert to float32 at least; in half precision small differences of a loss are lost."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "cw": margin}


def pgd(
    logits_fn: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    norm: str = "linf",
    loss: str | Loss = "ce",
    restarts: int = 1,
    random_start: bool = True,
    generator: Generators = None,
    draws: int = 1,
    fooled: Fooled | None = None,
) -> torch.Tensor:
    """Return adversarial images (B, 3, H, W) in [0, 1] within `eps` of `images`, found by PGD.

    logits_fn: images (B, 3, H, W) in [0, 1] -> logits (B, K). eps and step_size are in units of
    [0, 1]: 8/255, not 8. norm is linf or l2 (over the whole image). loss is ce, cw, or a function
    (logits, labels) -> (B,) to maximise; its logits and labels may be anything with a row for each
    image. Of several restarts, each image keeps the one with the highest margin, or the highest
    value of such a function. generator: one, or one for each image. draws: gradients of a random
    logits_fn that each step sums (EOT, Athalye et al., ICML 2018).
    fooled: (logits, labels) -> (B,) booleans; the attack on an image stops where it is true.
    Raises ValueError for settings out of range.
    """
    _check(images, eps, step_size, steps, restarts, draws, norm, loss, generator)
    loss_fn, criterion = (LOSSES[loss], margin) if isinstance(loss, str) else (loss, loss)
    best = images.detach().clone()
    best_value = torch.full((len(images),), -torch.inf, device=images.device)
    for _ in range(restarts):
        attacked = _ascend(
            logits_fn, images.detach(), labels, eps, step_size, steps, norm,
            loss_fn, random_start, generator, draws, fooled,
        )  # fmt: skip
        if restarts == 1:
            return attacked
        with torch.no_grad():
            outputs = logits_fn(attacked)
            value = criterion(outputs, labels).float()
            if fooled is not None:
                value = value.masked_fill(fooled(outputs, labels), torch.inf)
        better = value > best_value
        best[better], best_value[better] = attacked[better], value[better]
    return best


def _ascend(
    logits_fn: Callable[[torch.Tensor], Any],
    images: torch.Tensor,
    labels: torch.Tensor,
    eps: float,
    step_size: float,
    steps: int,
    norm: str,
    loss_fn: Loss,
    random_start: bool,
    generator: Generators,
    draws: int,
    fooled: Fooled | None,
) -> torch.Tensor:
    """Return the images after gradient ascent on the loss, from one start."""
    delta = torch.zeros_like(images)
    if random_start:
        delta = _project(_random(images, norm, eps, generator), images, norm, eps)
    attacked = images + delta
    active = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        delta.requires_grad_()
        loss = torch.zeros(())
        for _ in range(draws):
            outputs = logits_fn(images + delta)
            loss = loss + loss_fn(outputs, labels).sum()
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach()
        if fooled is not None:
            remaining = ~fooled(outputs, labels)
            active, images, labels = active[remaining], images[remaining], labels[remaining]
            delta, gradient = delta[remaining], gradient[remaining]
            if not len(active):
                break
        delta = _project(delta + step_size * _direction(gradient, norm), images, norm, eps)
        attacked[active] = images + delta
    return attacked


def _random(images: torch.Tensor, norm: str, eps: float, generator: Generators) -> torch.Tensor:
    """Draw perturbations uniformly from the ball of radius eps; generators may be on any device."""
    if isinstance(generator, Sequence):
        pairs = zip(torch.split(images, 1), generator, strict=True)
        return torch.cat([_random(image, norm, eps, rng) for image, rng in pairs])
    device = images.device if generator is None else generator.device
    if norm == "linf":
        noise = torch.rand(images.shape, generator=generator, device=device) * 2 - 1
        return (eps * noise).to(images)
    noise = torch.randn(images.shape, generator=generator, device=device)
    radius = torch.rand(len(images), generator=generator, device=device)
    radius = radius ** (1 / images[0].numel())
    return (eps * radius[:, None, None, None] * _direction(noise, "l2")).to(images)


def _direction(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """Return the direction of steepest ascent, of norm 1 in each image."""
    if norm == "linf":
        return gradient.sign()
    length: torch.Tensor = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
    return gradient / length[:, None, None, None]


def _project(delta: torch.Tensor, images: torch.Tensor, norm: str, eps: float) -> torch.Tensor:
    """Project perturbations into the ball of radius eps, and images into [0, 1]."""
    if norm == "linf":
        delta = delta.clamp(-eps, eps)
    else:
        length = delta.flatten(1).norm(dim=1).clamp(min=1e-12)
        delta = delta * (eps / length).clamp(max=1)[:, None, None, None]
    return (images + delta).clamp(0, 1) - images


def _check(
    images: torch.Tensor,
    eps: float,
    step_size: float,
    steps: int,
    restarts: int,
    draws: int,
    norm: str,
    loss: str | Loss,
    generator: Generators,
) -> None:
    """Raise ValueError for settings out of range."""
    if images.dtype == torch.float16:
        raise ValueError("attacks do not work in float16, whose gradients underflow: use float32")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be linf or l2, got {norm!r}")
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if isinstance(generator, Sequence) and len(generator) != len(images):
        raise ValueError(f"got {len(generator)} generators for {len(images)} images")
    if norm == "linf" and not 0 <= eps <= 1:
        raise ValueError(f"eps is in units of [0, 1], got {eps}: for {eps} of 255 give {eps}/255")
    if not (0 <= eps < math.inf and 0 <= step_size < math.inf):  # false for NaN, too
        raise ValueError(f"eps and step_size must be 0 or more, got {eps} and {step_size}")
    if steps < 0 or restarts < 1 or draws < 1:
        raise ValueError(
            f"steps must be 0 or more, restarts and draws 1 or more, "
            f"got {steps}, {restarts} and {draws}"
        )
