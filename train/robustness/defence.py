"""A CLIP with its purification, as a defence that is attacked: what it answers, and by which
gradient an attack sees it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgeclip.purify import MAX_SEED, Purifier
from train.models.classifier import Classifier
from train.robustness.purification import PURIFIED, NullPrior, purify

# encoder: the attack sees the model without its purification; what it finds is handed to the whole.
GRADIENTS = ("exact", "identity", "encoder", "released")


class View(NamedTuple):
    """What an attack sees of B images, and what the defence answers."""

    logits: Tensor  # (B, K), with the gradient of the mode
    embedding: Tensor  # (B, D), of which they are made
    answer: Tensor  # (B, K), the defence's own logits; in all modes but encoder they are `logits`


class Defence(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, K), purified where there is a purifier."""

    null_text: Tensor

    def __init__(
        self,
        model: Classifier,
        null_text: Tensor,
        purifier: Purifier = None,
        prior: NullPrior | None = None,
    ) -> None:
        """null_text: the unit embedding (D,) of the prompts without a class. prior: of CLIPure-Diff."""
        super().__init__()
        self.model, self.purifier, self.prior = model, purifier, prior
        self.register_buffer("null_text", null_text, persistent=False)

    @property
    def gradients(self) -> tuple[str, ...]:
        """The modes that differ: without purification there is one."""
        return GRADIENTS if self.purifier else GRADIENTS[:1]

    def view(self, images: Tensor, gradient: str) -> View:
        """Raises ValueError for a gradient that is not one of GRADIENTS."""
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
        output = self.model(images)
        if self.purifier is None:
            return View(output.logits, output.embedding, output.logits)
        mode = gradient if gradient in PURIFIED else "exact"
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient != "encoder"):
            purified = purify(output.embedding, self.null_text, self.purifier, mode, self.prior)
            answer = self.model.scores(purified)
        if gradient == "encoder":
            return View(output.logits, output.embedding, answer)
        return View(answer, purified, answer)

    def forward(self, images: Tensor) -> Tensor:
        return self.view(images, "exact").answer


class Guessed(Defence):
    """A defence by CLIPure-Diff as one sees it who does not know its seed: each view has another."""

    def __init__(self, defence: Defence, seed: int) -> None:
        super().__init__(defence.model, defence.null_text, defence.purifier, defence.prior)
        self.defence, self.seed = defence, seed
        self.restart()

    def restart(self) -> None:
        """The same guesses again, so that none depends on what was attacked before."""
        self.random = random.Random(self.seed)

    def view(self, images: Tensor, gradient: str) -> View:
        if gradient == "encoder":  # in which no seed plays a part but for the answer
            return self.defence.view(images, gradient)
        with torch.no_grad():
            answer = self.defence(images)
        guess = self.random.randint(0, MAX_SEED)
        self.purifier = replace(self.defence.purifier, seed=guess)
        return super().view(images, gradient)._replace(answer=answer)


class Seen(nn.Module):
    """A defence as attack libraries want it: images in [0, 1] -> logits."""

    def __init__(self, defence: Defence, gradient: str) -> None:
        super().__init__()
        self.defence, self.gradient = defence, gradient

    def forward(self, images: Tensor) -> Tensor:
        return self.defence.view(images, self.gradient).logits


def right(defence: Defence, images: Tensor, labels: Tensor) -> Tensor:
    """Which images the defence names rightly, (B,) booleans."""
    with torch.no_grad():
        return defence(images).argmax(1) == labels
