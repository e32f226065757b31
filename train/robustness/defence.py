"""Defences under attack: a CLIP with its purification, and its views by each gradient."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgeclip.purify import MAX_SEED, DiffPurifier, Purifier
from train.models.classifier import Classifier
from train.robustness.purification import PURIFIER_GRADIENTS, NullPrior, purify
from train.robustness.result_file import GRADIENTS


class View(NamedTuple):
    """Output of a defence for B images, as an attack uses it."""

    logits: Tensor  # (B, K), with the gradient of the mode
    embedding: Tensor  # (B, D), from which the logits are computed
    answer: Tensor  # (B, K), logits of the whole defence; `logits` in every mode but encoder


class Defence(nn.Module):
    """Classifier of images (B, 3, H, W) in [0, 1] to logits (B, K), purified by its purifier if any."""

    null_text: Tensor

    def __init__(
        self,
        model: Classifier,
        null_text: Tensor,
        purifier: Purifier = None,
        prior: NullPrior | None = None,
    ) -> None:
        """Keep the null text, a unit embedding (D,), and the prior that CLIPure-Diff needs."""
        super().__init__()
        self.model, self.purifier, self.prior = model, purifier, prior
        self.register_buffer("null_text", null_text, persistent=False)

    @property
    def gradients(self) -> tuple[str, ...]:
        """Gradients that differ: one without purification, else all of GRADIENTS."""
        return GRADIENTS if self.purifier else GRADIENTS[:1]

    def view(self, images: Tensor, gradient: str) -> View:
        """Return the output with one of GRADIENTS. Raises ValueError for another gradient."""
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
        output = self.model(images)
        if self.purifier is None:
            return View(output.logits, output.embedding, output.logits)
        mode = gradient if gradient in PURIFIER_GRADIENTS else "exact"
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradient != "encoder"):
            purified = purify(output.embedding, self.null_text, self.purifier, mode, self.prior)
            answer = self.model.scores(purified)
        if gradient == "encoder":
            return View(output.logits, output.embedding, answer)
        return View(answer, purified, answer)

    def forward(self, images: Tensor) -> Tensor:
        return self.view(images, "exact").answer


class DefenceWrapper(Defence):
    """Another defence, with a view of its own for attacks."""

    def __init__(self, defence: Defence) -> None:
        super().__init__(defence.model, defence.null_text, defence.purifier, defence.prior)
        self.defence = defence


class UnknownSeed(DefenceWrapper):
    """CLIPure-Diff for an attacker who does not know its seed: each view draws another seed."""

    def __init__(self, defence: Defence, seed: int) -> None:
        super().__init__(defence)
        self.seed = seed
        self.restart()

    def restart(self) -> None:
        """Start the draws again, so that none depends on earlier attacks."""
        self.random = random.Random(self.seed)

    def view(self, images: Tensor, gradient: str) -> View:
        purifier = self.defence.purifier
        if gradient == "encoder" or not isinstance(purifier, DiffPurifier):  # no seed in the logits
            return self.defence.view(images, gradient)
        with torch.no_grad():
            answer: Tensor = self.defence(images)
        self.purifier = replace(purifier, seed=self.random.randint(0, MAX_SEED))
        return super().view(images, gradient)._replace(answer=answer)


class FixedNoise(DefenceWrapper):
    """Random defence with the same noise for every image and in every view."""

    def __init__(self, defence: Defence, seed: int) -> None:
        super().__init__(defence)
        self.seed = seed

    def view(self, images: Tensor, gradient: str) -> View:
        views = []
        with torch.random.fork_rng():
            for image in torch.split(images, 1):
                torch.manual_seed(self.seed)
                views.append(self.defence.view(image, gradient))
        return View(*map(torch.cat, zip(*views, strict=True)))


class Transfer(DefenceWrapper):
    """Defence that is attacked by the gradient of another model, the surrogate."""

    def __init__(self, defence: Defence, surrogate: Defence) -> None:
        super().__init__(defence)
        self.surrogate = surrogate

    def view(self, images: Tensor, gradient: str) -> View:
        with torch.no_grad():
            answer = self.defence.view(images, gradient).answer
        return self.surrogate.view(images, gradient)._replace(answer=answer)


class LogitsModel(nn.Module):
    """Adapter of a defence to attack libraries: a module of images in [0, 1] to logits."""

    def __init__(self, defence: Defence, gradient: str) -> None:
        super().__init__()
        self.defence, self.gradient = defence, gradient

    def forward(self, images: Tensor) -> Tensor:
        return self.defence.view(images, self.gradient).logits


def correct(defence: Defence, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images the defence classifies correctly, (B,) booleans."""
    with torch.no_grad():
        logits: Tensor = defence(images)
    return logits.argmax(1) == labels
