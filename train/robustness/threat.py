"""Threat models, and the attacks by name.

apgd-ce, apgd-t, fab-t, square   AutoAttack's, by the library torchattacks with the settings of
                                 AutoAttack's standard version (Croce and Hein, ICML 2020)
pgd, cw                          PGD on the cross-entropy and on the margin (train.attacks)
feature                          PGD towards the embedding of an image of another class
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor

from edgeclip.purify import DiffPurifier
from train.attacks import cross_entropy, margin, pgd
from train.data.loader import generators
from train.errors import SettingsError
from train.losses import squared_distance
from train.models.classifier import Attack
from train.robustness.defence import (
    Defence,
    DefenceWrapper,
    LogitsModel,
    UnknownSeed,
    View,
    correct,
)
from train.robustness.result_file import CLEAN, stage_key

AUTOATTACK = (
    "apgd-ce",
    "apgd-t",
    "fab-t",
    "square",
)  # a cascade: each attacks what is left correct
ATTACKS = (*AUTOATTACK, "pgd", "cw", "feature")
TARGETED_CLASSES = 9  # tried by a targeted attack
LOGITS = 4  # used by the loss of apgd-t


@dataclass(frozen=True)
class Threat:
    """Size and budget of the attacks; eps and step_size are in units of [0, 1]."""

    norm: str
    eps: float
    steps: int
    step_size: float  # for pgd, cw and feature
    restarts: int = 1
    queries: int = 5000  # for square
    eot: int = 1  # gradients averaged in each step, for a random defence
    seed: int = 0


@dataclass(frozen=True)
class TargetImages:
    """Images that the attack "feature" aims at: unit embeddings (M, D) and classes (M,)."""

    purified: Tensor
    unpurified: Tensor
    labels: Tensor

    @classmethod
    def embed(cls, defence: Defence, images: Tensor, labels: Tensor) -> TargetImages:
        """Embed images (M, 3, H, W) in [0, 1] with and without the defence's purification."""
        with torch.no_grad():
            purified, unpurified = (
                F.normalize(defence.view(images, gradient).embedding, dim=1)
                for gradient in ("exact", "encoder")
            )
        return cls(purified, unpurified, labels)

    def embeddings(self, gradient: str) -> Tensor:
        """Return the embeddings as an attack by this gradient sees them."""
        return self.unpurified if gradient == "encoder" else self.purified

    def nearest(self, embeddings: Tensor, labels: Tensor, gradient: str) -> Tensor:
        """Return, for each of B embeddings, the index of the nearest image of another class, (B,).

        Raises SettingsError where all images are of one class.
        """
        same = labels[:, None] == self.labels
        if same.all(1).any():
            raise SettingsError(
                "the attack 'feature' needs images of two classes, and the first images of the draw "
                "are all of one: omit it, or choose another --seed"
            )
        cosines = F.normalize(embeddings, dim=1) @ self.embeddings(gradient).T
        return cosines.masked_fill(same, -torch.inf).argmax(1)


def build(
    name: str, defence: Defence, gradient: str, threat: Threat, targets: TargetImages
) -> Attack:
    """Return an attack: a function of images (B, 3, H, W), labels (B,) and seeds (B,).

    With threat.eot above 1 the attack does not know the seed of CLIPure-Diff, and averages the
    gradients of other seeds. Raises SettingsError for an attack that needs more classes.
    """
    # A wrapper's own view already settles what is known of the seed.
    seeded = isinstance(defence.purifier, DiffPurifier) and not isinstance(defence, DefenceWrapper)
    if threat.eot == 1 or not seeded or name == "square":
        return _build(name, defence, gradient, threat, targets)
    unknown = UnknownSeed(defence, threat.seed)
    inner = _build(name, unknown, gradient, threat, targets)

    def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        unknown.restart()
        return inner(images, labels, seeds)

    return attack


def _build(
    name: str, defence: Defence, gradient: str, threat: Threat, targets: TargetImages
) -> Attack:
    if name in AUTOATTACK:
        return _library_attack(name, defence, gradient, threat, targets)
    return _pgd_attack(name, defence, gradient, threat, targets)


def _library_attack(
    name: str, defence: Defence, gradient: str, threat: Threat, targets: TargetImages
) -> Attack:
    """Return an attack of torchattacks, followed by cw on images that the library leaves alone.

    The library leaves an image alone if its view misclassifies it, but the defence may not.
    """
    # Square uses answers, which under every gradient are those of the whole defence.
    model = LogitsModel(defence, "exact" if name == "square" else gradient).eval()
    library = _library(name, model, len(defence.model.classes), threat)
    cw = _pgd_attack("cw", defence, gradient, threat, targets)

    def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        attacked: Tensor = library(images, labels).detach()
        if isinstance(defence, UnknownSeed):
            left = correct(defence.defence, attacked, labels)
        elif gradient == "encoder" and name != "square":
            with torch.no_grad():
                left = model(images).argmax(1) != labels
        else:
            return attacked
        if left.any():
            attacked[left] = cw(images[left], labels[left], seeds[left])
        return attacked

    return attack


def _library(name: str, model: LogitsModel, classes: int, threat: Threat) -> Any:
    """Return an attack of torchattacks. Raises SettingsError for too few classes."""
    needed = LOGITS if name == "apgd-t" else 2
    if classes < needed:
        raise SettingsError(
            f"{name} needs {needed} classes or more, and the data set has {classes}: choose others "
            "with --attack"
        )
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    shared = {"norm": norm, "eps": threat.eps, "n_restarts": threat.restarts, "seed": threat.seed}
    apgd = shared | {"steps": threat.steps, "eot_iter": threat.eot, "rho": 0.75}
    count = min(classes, TARGETED_CLASSES + 1)
    if name == "apgd-ce":
        return torchattacks.APGD(model, **apgd, loss="ce")
    if name == "apgd-t":
        return torchattacks.APGDT(model, **apgd, n_classes=count)
    if name == "fab-t":
        return torchattacks.FAB(
            model, **shared, steps=threat.steps, multi_targeted=True, n_classes=count,
            alpha_max=0.1, eta=1.05, beta=0.9,
        )  # fmt: skip
    # The published schedule of square sizes is that of 10,000 queries, whatever their number.
    return torchattacks.Square(
        model, **shared, n_queries=threat.queries, p_init=0.8, loss="margin", resc_schedule=False
    )


def _pgd_attack(
    name: str, defence: Defence, gradient: str, threat: Threat, targets: TargetImages
) -> Attack:
    """Return a PGD attack, which stops on an image once the defence misclassifies it.

    Under the released gradient the last image counts instead: asking the defence at every step is a
    search that this gradient does not make, and would hide how little the gradient finds.
    """

    def similarity(view: View, classes: Tensor) -> Tensor:
        target = targets.embeddings(gradient)[classes[:, 1]]
        return -squared_distance(F.normalize(view.embedding, dim=1), target)

    def misclassified(view: View, classes: Tensor) -> Tensor:
        return view.answer.argmax(1) != classes[:, 0]

    loss = {
        "pgd": lambda view, classes: cross_entropy(view.logits, classes[:, 0]),
        "cw": lambda view, classes: margin(view.logits, classes[:, 0]),
        "feature": similarity,
    }[name]

    def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        nearest = labels
        if name == "feature":
            with torch.no_grad():
                embedding = defence.view(images, gradient).embedding
            nearest = targets.nearest(embedding, labels, gradient)
        return pgd(
            lambda x: defence.view(x, gradient),
            images,
            torch.stack([labels, nearest], dim=1),
            eps=threat.eps,
            step_size=threat.step_size,
            steps=threat.steps,
            norm=threat.norm,
            loss=loss,
            restarts=threat.restarts,
            generator=generators(seeds, images.device),
            draws=threat.eot,
            fooled=None if gradient == "released" else misclassified,
        )

    return attack


@dataclass(frozen=True)
class Stage:
    """One attack by one gradient, on the images that an earlier stage left correct."""

    attack: str
    gradient: str
    key: str  # of its marks
    after: str  # key of the earlier stage's marks


def plan(attacks: Sequence[str], gradients: Sequence[str], classes: int) -> list[Stage]:
    """Return the stages of a measurement: "autoattack" is a cascade of four, the others stand alone.

    Below four classes the cascade omits apgd-t, which is not defined there. Square uses no gradient,
    and runs with the first one only.
    """
    stages = []
    for gradient in gradients:
        for attack in attacks:
            cascade = attack == "autoattack"
            before = CLEAN
            for name in AUTOATTACK if cascade else (attack,):
                if name == "square" and gradient != gradients[0]:
                    continue
                if name == "apgd-t" and cascade and classes < LOGITS:
                    continue
                key = stage_key(attack, gradient, name if cascade else "")
                stages.append(Stage(name, gradient, key, before))
                before = key
    return stages
