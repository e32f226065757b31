"""CLIPure-Cos in PyTorch, with the gradient that an attack is to see through it.

The equations are those of CLIPure (Zhang et al., ICLR 2025, arXiv 2502.18176, section 4), for each
image by itself. The values are the same in every mode; only the backward pass differs:

exact     the derivative of the purification as the function that it is
identity  as if there were no purification (BPDA, Athalye et al., ICML 2018)
released  the published loop, which detaches the direction of each step. What is left of the
          gradient shrinks by the length of a step each time, until rounding is all there is: an
          attack that uses it measures masking, not robustness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeclip.purify import CosPurifier

PURIFIED = ("exact", "identity", "released")  # gradients through a purification
MIN_SINE = 1e-5  # as in csrc/math.h: closer to the null text there is no direction towards it


def purify(embedding: Tensor, null_text: Tensor, purifier: CosPurifier, gradient: str) -> Tensor:
    """Embeddings (B, D) of any norm, rotated towards the null text (D,); their norms stay.

    Raises ValueError for a gradient that is not one of PURIFIED.
    """
    if gradient == "exact":
        return _closed_form(embedding, null_text, purifier)
    if gradient == "identity":
        with torch.no_grad():
            change = _closed_form(embedding, null_text, purifier) - embedding
        return embedding + change
    if gradient == "released":
        return _detached_loop(embedding, null_text, purifier)
    raise ValueError(f"gradient must be one of {', '.join(PURIFIED)}, got {gradient!r}")


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
    norm = embedding.norm(dim=1, keepdim=True)
    unit, text = embedding / norm, F.normalize(null_text, dim=0)
    for _ in range(purifier.steps):
        with torch.no_grad():
            tangent = text - (unit @ text)[:, None] * unit
            sine = tangent.norm(dim=1, keepdim=True)
            step = torch.where(sine >= MIN_SINE, purifier.step_size * tangent / sine, 0)
        unit = F.normalize(unit + step, dim=1)
    return norm * unit
