"""What an attacker may do, and the attacks by name.

apgd-ce, apgd-t, fab-t, square   AutoAttack's, by the library torchattacks with the settings of
                                 AutoAttack's standard version (Croce and Hein, ICML 2020)
pgd, cw                          PGD on the cross-entropy and on the margin (train.attacks)
feature                          PGD towards the embedding of an image of another class
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from train.robustness.defence import Defence, Guessed, Seen, View, right

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")  # each on what the ones before left right
ATTACKS = (*AUTOATTACK, "pgd", "cw", "feature")
TARGETS = 9  # classes that a targeted attack tries
LOGITS = 4  # that the loss of apgd-t is made of


@dataclass(frozen=True)
class Threat:
    """Sizes are of pixels in [0, 1]; step_size is of pgd, cw and feature."""

    norm: str
    eps: float
    steps: int
    step_size: float
    restarts: int = 1
    queries: int = 5000  # of square
    eot: int = 1  # gradients averaged in each step, for a random defence
    seed: int = 0


@dataclass(frozen=True)
class Bank:
    """Images to be taken for: unit embeddings (M, D), purified and not, and their classes (M,)."""

    purified: Tensor
    plain: Tensor
    labels: Tensor

    @classmethod
    def of(cls, defence: Defence, images: Tensor, labels: Tensor) -> Bank:
        with torch.no_grad():
            views = [defence.view(images, gradient) for gradient in ("exact", "encoder")]
        return cls(*(F.normalize(view.embedding, dim=1) for view in views), labels)

    def seen(self, gradient: str) -> Tensor:
        """The embeddings in the space that an attack by this gradient sees."""
        return self.plain if gradient == "encoder" else self.purified

    def nearest(self, embeddings: Tensor, labels: Tensor, gradient: str) -> Tensor:
        """For each of B images the nearest one of another class, (B,). Raises SettingsError."""
        same = labels[:, None] == self.labels
        if same.all(1).any():
            raise SettingsError(
                "the attack 'feature' needs images of two classes, and the first of the draw are of "
                "one: leave it out, or name another --seed"
            )
        cosines = F.normalize(embeddings, dim=1) @ self.seen(gradient).T
        return cosines.masked_fill(same, -torch.inf).argmax(1)


def build(name: str, defence: Defence, gradient: str, threat: Threat, bank: Bank) -> Attack:
    """The attack as a function of images (B, 3, H, W), labels (B,) and seeds (B,).

    With more than one draw per step the seed of CLIPure-Diff is not known to it, and the gradients of
    other seeds are averaged. Raises SettingsError for an attack that this number of classes does not
    allow.
    """
    # Not what only stands for a defence, as the checks have it: its view is not its purifier's.
    drawn = type(defence) is Defence and isinstance(defence.purifier, DiffPurifier)
    if threat.eot > 1 and drawn and name != "square":
        guessed = Guessed(defence, threat.seed)
        inner = _build(name, guessed, gradient, threat, bank)

        def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
            guessed.restart()
            return inner(images, labels, seeds)

        return attack
    return _build(name, defence, gradient, threat, bank)


def _build(name: str, defence: Defence, gradient: str, threat: Threat, bank: Bank) -> Attack:
    if name in ("pgd", "cw", "feature"):
        return _ours(name, defence, gradient, threat, bank)
    classes = len(defence.model.classes)
    needed = LOGITS if name == "apgd-t" else 2
    if classes < needed:
        raise SettingsError(
            f"{name} needs {needed} classes or more, here are {classes}: name others with --attack"
        )
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    shared = {"norm": norm, "eps": threat.eps, "n_restarts": threat.restarts, "seed": threat.seed}
    apgd = shared | {"steps": threat.steps, "eot_iter": threat.eot, "rho": 0.75}
    # Square asks for answers, which under every gradient are those of the whole defence.
    seen = Seen(defence, "exact" if name == "square" else gradient).eval()
    targets = min(classes, TARGETS + 1)
    library = {
        "apgd-ce": lambda: torchattacks.APGD(seen, **apgd, loss="ce"),
        "apgd-t": lambda: torchattacks.APGDT(seen, **apgd, n_classes=targets),
        "fab-t": lambda: torchattacks.FAB(
            seen, **shared, steps=threat.steps, multi_targeted=True, n_classes=targets,
            alpha_max=0.1, eta=1.05, beta=0.9,
        ),
        # The published schedule of square sizes is the one of 10,000 queries, whatever their number.
        "square": lambda: torchattacks.Square(
            seen, **shared, n_queries=threat.queries, p_init=0.8, loss="margin", resc_schedule=False
        ),
    }[name]()  # fmt: skip

    def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        found = library(images, labels).detach()
        # The library leaves alone what it sees named wrongly; the defence may name it rightly.
        if isinstance(defence, Guessed):
            left = right(defence.defence, found, labels)
        elif gradient == "encoder" and name != "square":
            with torch.no_grad():
                left = seen(images).argmax(1) != labels
        else:
            return found
        if left.any():
            cw = _ours("cw", defence, gradient, threat, bank)
            found[left] = cw(images[left], labels[left], seeds[left])
        return found

    return attack


def _ours(name: str, defence: Defence, gradient: str, threat: Threat, bank: Bank) -> Attack:
    """PGD, which leaves an image alone once the defence itself names it wrongly.

    Not under the released gradient: asking the defence at every step is a search that this gradient
    does not make, and would hide how little it finds. There the last image is judged.
    """

    def towards(view: View, target: Tensor) -> Tensor:
        wanted = bank.seen(gradient)[target[:, 1]]
        return -squared_distance(F.normalize(view.embedding, dim=1), wanted)

    def fooled(view: View, target: Tensor) -> Tensor:
        return view.answer.argmax(1) != target[:, 0]

    loss = {
        "pgd": lambda view, target: cross_entropy(view.logits, target[:, 0]),
        "cw": lambda view, target: margin(view.logits, target[:, 0]),
        "feature": towards,
    }[name]

    def attack(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        other = labels
        if name == "feature":
            with torch.no_grad():
                own = defence.view(images, gradient).embedding
            other = bank.nearest(own, labels, gradient)
        return pgd(
            lambda x: defence.view(x, gradient),
            images,
            torch.stack([labels, other], dim=1),
            eps=threat.eps,
            step_size=threat.step_size,
            steps=threat.steps,
            norm=threat.norm,
            loss=loss,
            restarts=threat.restarts,
            generator=generators(seeds, images.device),
            draws=threat.eot,
            fooled=None if gradient == "released" else fooled,
        )

    return attack


@dataclass(frozen=True)
class Stage:
    """One attack by one gradient, on the images that are still right after another."""

    attack: str
    gradient: str
    key: str  # of its marks
    after: str  # the key of the marks before it


def plan(attacks: Sequence[str], gradients: Sequence[str], classes: int) -> list[Stage]:
    """The stages of a measurement: "autoattack" is a cascade of four, the others stand alone.

    With fewer than four classes the cascade goes without apgd-t, which is not defined there.
    Square reads no gradient, and so it runs with the first one alone.
    """
    stages = []
    for gradient in gradients:
        for attack in attacks:
            before = "clean"
            for name in AUTOATTACK if attack == "autoattack" else (attack,):
                if name == "square" and gradient != gradients[0]:
                    continue
                if name == "apgd-t" and attack == "autoattack" and classes < LOGITS:
                    continue
                prefix = f"{attack} {name}" if attack == "autoattack" else name
                stages.append(Stage(name, gradient, f"{prefix}/{gradient}", before))
                if attack == "autoattack":
                    before = stages[-1].key
    return stages
