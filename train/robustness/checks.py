"""Ten checks that a figure of robustness has to pass before it is believed.

Each looks, on the first images of the draw, for one way in which an attack may have failed rather
than a defence held (Carlini et al., arXiv 1902.06705; Athalye et al., ICML 2018; Tramer et al.,
NeurIPS 2020). All of them attack by train.robustness.threat, as the measurement does.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from edgeclip.purify import MAX_SEED, DiffPurifier, Purifier
from train.attacks import cross_entropy, margin
from train.data.loader import split
from train.robustness.defence import Defence, View, right
from train.robustness.threat import Bank, Threat, build

TOLERANCE = 0.002  # of accuracies: 0.2 points
STEPS = 20  # of the attacks that a check repeats for many settings
LARGE = {"linf": 64 / 255, "l2": 8.0}  # an eps at which nothing can be recognised any more
LIMIT = {"linf": 0.9, "l2": float("inf")}
SMALL_GRADIENT = 1e-3  # of the plain model's
ZERO_GRADIENTS = 0.05  # share of images
DIRECTIONS, DIFFERENCE = 32, 1e-5  # of finite differences, in float64
AGREEING = 0.99  # cosine
SPREAD = 0.05  # of accuracy, for one purification step more or less
PRECISION = 0.01  # of accuracy, between an exported graph and PyTorch
DRAWS, RESUBMISSIONS, STARTS = 20, 10, 5


class Finding(NamedTuple):
    """passed is None where the check does not apply."""

    passed: bool | None
    figure: str


@dataclass(frozen=True)
class Trial:
    """What the checks need: M images as attacks see them, and how the measurement went on them."""

    defence: Defence
    threat: Threat
    images: Tensor  # (M, 3, H, W) in [0, 1]
    labels: Tensor  # (M,)
    seeds: Tensor  # (M,)
    clean: Tensor  # (M,) booleans: right as they are
    held: Tensor  # (M,) right under every attack of the measurement
    before_square: Tensor  # (M,) the same without square
    square: Tensor | None  # (M,) right under square, if the measurement ran it
    bank: Bank
    batch_size: int
    surrogate: Defence | None = None  # another model, whose attacks are handed to this one
    shipped: Mapping[str, Callable[[Tensor], Tensor]] | None = (
        None  # precision -> images -> classes
    )

    def attack(
        self, name: str, gradient: str = "exact", defence: Defence | None = None, **changes: float
    ) -> Tensor:
        """The images after an attack on `defence`; those named wrongly as they are stay so."""
        threat = replace(self.threat, **changes)
        if "eps" in changes:
            threat = replace(threat, step_size=threat.eps / 4)
        attacked = build(name, defence or self.defence, gradient, threat, self.bank)
        found = self.images.clone()
        for part in split(self.clean.nonzero().flatten(), self.batch_size):
            found[part] = attacked(self.images[part], self.labels[part], self.seeds[part])
        return found

    def holds(self, images: Tensor, defence: Defence | None = None) -> Tensor:
        """Which of the images right before are still right, (M,)."""
        parts = zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        return self.clean & torch.cat([right(defence or self.defence, x, y) for x, y in parts])

    def brief(self) -> int:
        return min(self.threat.steps, STEPS)


def _percent(accuracies: Mapping[str, float] | list[float]) -> str:
    if isinstance(accuracies, list):
        return ", ".join(f"{100 * value:.1f}" for value in accuracies)
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in accuracies.items())


def _mean(marks: Tensor) -> float:
    return marks.float().mean().item()


def _rises(accuracies: list[float], count: int) -> bool:
    """Whether a stronger attack ever does worse by more than one image."""
    slack = max(TOLERANCE, 1 / count) + 1e-9
    return any(after > before + slack for before, after in itertools.pairwise(accuracies))


def falls(trial: Trial) -> Finding:
    """A large eps leaves nothing right, with the purification and without; more is never less."""
    eps = trial.threat.eps
    large = max(8 * eps, LARGE[trial.threat.norm])
    sizes = [min(x, LIMIT[trial.threat.norm]) for x in (eps / 4, eps / 2, eps, 2 * eps, large)]
    steps = trial.brief()
    by_eps = [_mean(trial.holds(trial.attack("cw", eps=size, steps=steps))) for size in sizes]
    plain = Defence(trial.defence.model, trial.defence.null_text)
    found = trial.attack("cw", "exact", plain, eps=sizes[-1], steps=steps)
    bare = _mean(trial.holds(found, plain))
    counts = sorted({max(1, steps // 4), max(1, steps // 2), steps})
    by_steps = [
        _mean(trial.holds(trial.attack("cw", steps=n, step_size=2.5 * eps / n))) for n in counts
    ]
    count = len(trial.images)
    passed = max(by_eps[-1], bare) <= 0.01 and not (
        _rises(by_eps, count) or _rises(by_steps, count)
    )
    names = [
        f"{size * 255:g}/255" if trial.threat.norm == "linf" else f"{size:g}" for size in sizes
    ]
    return Finding(
        passed,
        f"right in %: eps {_percent(dict(zip(names, by_eps, strict=True)))}; without purification at "
        f"{names[-1]} {100 * bare:.1f}; after {', '.join(map(str, counts))} steps "
        f"{_percent(by_steps)}",
    )


def _gradient(defence: Defence, trial: Trial, loss: Callable[[View, Tensor], Tensor]) -> Tensor:
    """(M, pixels): the gradient of the loss by the exact mode."""
    rows = []
    parts = zip(
        trial.images.split(trial.batch_size), trial.labels.split(trial.batch_size), strict=True
    )
    for images, labels in parts:
        images = images.clone().requires_grad_()
        value = loss(defence.view(images, "exact"), labels).sum()
        (gradient,) = torch.autograd.grad(value, images, allow_unused=True)
        rows.append(torch.zeros_like(images) if gradient is None else gradient)
    return torch.cat(rows).flatten(1)


def gradients(trial: Trial) -> Finding:
    """Gradients are there, of the plain model's size, and those of the function that is evaluated."""
    by_loss = {
        "cross-entropy": lambda view, labels: cross_entropy(view.logits, labels),
        "margin": lambda view, labels: margin(view.logits, labels),
    }
    defence = Fixed(trial.defence, trial.threat.seed) if _random(trial) else trial.defence
    found = {name: _gradient(defence, trial, loss) for name, loss in by_loss.items()}
    zero = max(_mean((rows == 0).all(1)) for rows in found.values())
    plain = _gradient(
        Defence(trial.defence.model, trial.defence.null_text), trial, by_loss["margin"]
    )
    ratio = (found["margin"].norm(dim=1) / plain.norm(dim=1).clamp(min=1e-30)).median().item()
    cosine = _finite_difference_cosine(defence, trial, found["margin"])
    passed = zero <= ZERO_GRADIENTS and ratio >= SMALL_GRADIENT and cosine >= AGREEING
    return Finding(
        passed,
        f"zero gradients {100 * zero:.1f} %; norm {ratio:.3g} of the plain model's; cosine with "
        f"float64 finite differences {cosine:.4f}",
    )


def _random(trial: Trial) -> bool:
    """Whether the same images get other answers when they are asked again."""
    with torch.no_grad():
        return not torch.equal(trial.defence(trial.images), trial.defence(trial.images))


def _finite_difference_cosine(defence: Defence, trial: Trial, gradient: Tensor) -> float:
    """The median, over some images, of the cosine between slopes along random directions."""
    exact = copy.deepcopy(defence).double()
    rng = torch.Generator().manual_seed(trial.threat.seed)
    pixels = gradient.shape[1]
    directions = torch.randn(DIRECTIONS, pixels, generator=rng).to(gradient).double()
    cosines = []
    for i in range(min(8, len(trial.images))):
        image, labels = trial.images[i].double(), trial.labels[i].expand(DIRECTIONS)
        step = DIFFERENCE * directions.view(-1, *image.shape)
        with torch.no_grad():
            values = [margin(exact(image + sign * step), labels) for sign in (1, -1)]
        slopes = (values[0] - values[1]) / (2 * DIFFERENCE)
        along = directions @ gradient[i].double()
        scale = (slopes.norm() * along.norm()).clamp(min=1e-300)
        cosines.append((slopes @ along / scale).item())
    return torch.tensor(cosines).median().item()


def transfer(trial: Trial) -> Finding:
    """What fools an undefended model is no stronger than the attack on the defence itself."""
    figures = {}
    if trial.defence.purifier is not None:
        found = trial.attack("cw", "encoder")
        figures["from the unpurified model"] = _mean(trial.holds(found))
    if trial.surrogate is not None:
        found = trial.attack("cw", "exact", Borrowed(trial.defence, trial.surrogate).eval())
        figures["from another model"] = _mean(trial.holds(found))
    if not figures:
        return Finding(None, "no purification, and no other model by --transfer-from")
    held = _mean(trial.held)
    passed = min(figures.values()) >= held - TOLERANCE
    return Finding(passed, f"right in %: {_percent(figures)}; under all attacks {100 * held:.1f}")


class Borrowed(Defence):
    """A defence that is attacked by the gradient of another model."""

    def __init__(self, defence: Defence, other: Defence) -> None:
        super().__init__(defence.model, defence.null_text, defence.purifier, defence.prior)
        self.defence, self.other = defence, other

    def view(self, images: Tensor, gradient: str) -> View:
        with torch.no_grad():
            answer = self.defence.view(images, gradient).answer
        return self.other.view(images, gradient)._replace(answer=answer)


def noise(trial: Trial) -> Finding:
    """The attack does more than noise of the same size does."""
    rng = torch.Generator().manual_seed(trial.threat.seed)
    held = trial.clean
    for _ in range(STARTS):
        noise = torch.randn(trial.images.shape, generator=rng).to(trial.images)
        if trial.threat.norm == "linf":
            delta = trial.threat.eps * noise.sign()
        else:
            delta = trial.threat.eps * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        held = held & trial.holds((trial.images + delta).clamp(0, 1))
    floor, found = _mean(held), _mean(trial.held)
    passed = found <= max(floor - 0.02, 0.02)
    text = f"right in %: under the worst of {STARTS} random starts {100 * floor:.1f}, under attack "
    return Finding(passed, text + f"{100 * found:.1f}")


def square(trial: Trial) -> Finding:
    """The attack that needs no gradient is not stronger than those that use it."""
    marks, queries = trial.square, trial.threat.queries
    if marks is None:
        queries = min(queries, 1000)
        marks = trial.holds(trial.attack("square", queries=queries))
    else:
        marks = trial.before_square & marks
    black, white = _mean(marks), _mean(trial.before_square)
    return Finding(
        black >= white - TOLERANCE,
        f"right in %: under square with {queries} queries {100 * black:.1f}, under the attacks that "
        f"use gradients {100 * white:.1f}",
    )


def batches(trial: Trial) -> Finding:
    """An image's logits do not depend on the images beside it."""
    images = trial.images[:32]
    scale = trial.defence.model.logit_scale.item()
    with torch.no_grad():
        whole = trial.defence(images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        order = order.to(images.device)
        others = {
            "1": torch.cat([trial.defence(part) for part in images.split(1)]),
            "2": torch.cat([trial.defence(part) for part in images.split(2)]),
            "permuted": trial.defence(images[order])[order.argsort()],
        }
    apart = {name: ((x - whole).abs().max() / scale).item() for name, x in others.items()}
    passed = max(apart.values()) <= 1e-4
    shown = ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
    return Finding(passed, f"largest difference of cosines from a batch of {len(images)}: {shown}")


def parity(trial: Trial) -> Finding:
    """One purification step more or less, or another step size, does not turn the figures over."""
    own = trial.defence.purifier
    if own is None:
        return Finding(None, "no purification")
    counts = [max(own.steps + k, 0) for k in (-1, 0, 1)]
    sizes = sorted({0.1, 1.0, 10.0, 30.0, own.step_size})
    shown, spread = [], 0.0
    for size in sizes:
        pairs = [_with(trial, replace(own, steps=count, step_size=size)) for count in counts]
        cells = ", ".join(f"{100 * clean:.0f}/{100 * held:.0f}" for clean, held in pairs)
        shown.append(f"{size:g}: {cells}")
        if size == own.step_size:
            spread = max(max(values) - min(values) for values in zip(*pairs, strict=True))
    steps = ", ".join(map(str, counts))
    return Finding(
        spread <= SPREAD,
        f"right in % as they are/under attack after {steps} steps of size {'; '.join(shown)}",
    )


def _with(trial: Trial, purifier: Purifier) -> tuple[float, float]:
    """Accuracy with another purification, on the images as they are and under a short attack."""
    other = copy.copy(trial.defence)
    other.purifier = purifier
    clean = right(other, trial.images, trial.labels)
    moved = dataclasses.replace(trial, defence=other, clean=clean)
    return _mean(clean), _mean(moved.holds(moved.attack("cw", steps=min(trial.brief(), 10))))


def randomness(trial: Trial) -> Finding:
    """A random defence is attacked on average, with its noise known, and by asking again."""
    if isinstance(trial.defence.purifier, DiffPurifier):
        return _seeds(trial)
    if not _random(trial):
        return Finding(True, "the same answer twice, to the last bit")
    steps = trial.brief()
    average = trial.attack("cw", steps=steps, eot=DRAWS)
    fixed = Fixed(trial.defence, trial.threat.seed).eval()
    known = trial.attack("cw", "exact", fixed, steps=steps)
    again = trial.held
    for _ in range(RESUBMISSIONS):
        again = again & trial.holds(average)
    figures = {
        f"EOT with {DRAWS} draws": _mean(trial.holds(average)),
        "with its noise known": _mean(trial.holds(known, fixed)),
        f"worst of {RESUBMISSIONS} submissions": _mean(again),
    }
    held = _mean(trial.held)
    passed = trial.threat.eot >= DRAWS and held <= min(figures.values()) + TOLERANCE
    return Finding(
        passed,
        f"random; right in %: {_percent(figures)}; measured {100 * held:.1f} with "
        f"{trial.threat.eot} draws per step",
    )


def _seeds(trial: Trial) -> Finding:
    """Of CLIPure-Diff, whose noise is all in its seed: known, not known, and drawn again."""
    own, steps = trial.defence.purifier, trial.brief()
    known = trial.attack("cw", steps=steps, eot=1)
    again = trial.clean
    for seed in range(own.seed + 1, own.seed + 1 + RESUBMISSIONS):
        other = copy.copy(trial.defence)
        other.purifier = replace(own, seed=seed % (MAX_SEED + 1))
        again = again & trial.holds(known, other)
    figures = {
        "the seed known": _mean(trial.holds(known)),
        f"EOT with {DRAWS} draws of it": _mean(
            trial.holds(trial.attack("cw", steps=steps, eot=DRAWS))
        ),
    }
    held = _mean(trial.held)
    return Finding(
        not _random(trial) and held <= min(figures.values()) + TOLERANCE,
        f"right in %: {_percent(figures)}; under all attacks {100 * held:.1f}; with the seed known, "
        f"by {RESUBMISSIONS} other seeds in turn {100 * _mean(again):.1f}",
    )


class Fixed(Defence):
    """A random defence whose noise is the same each time, whatever is beside an image."""

    def __init__(self, defence: Defence, seed: int) -> None:
        super().__init__(defence.model, defence.null_text, defence.purifier, defence.prior)
        self.defence, self.seed = defence, seed

    def view(self, images: Tensor, gradient: str) -> View:
        views = []
        with torch.random.fork_rng():
            for image in images.split(1):
                torch.manual_seed(self.seed)
                views.append(self.defence.view(image, gradient))
        return View(*(torch.cat(parts) for parts in zip(*views, strict=True)))


def precision(trial: Trial) -> Finding:
    """The exported graphs fall to what the model in PyTorch falls to."""
    if trial.shipped is None:
        return Finding(None, "no bundle: nothing is exported")
    found = trial.attack("cw")
    ours = _mean(trial.holds(found))
    figures = {
        name: _mean(trial.clean & (classes(found) == trial.labels))
        for name, classes in trial.shipped.items()
    }
    passed = all(abs(value - ours) <= PRECISION + 1e-9 for value in figures.values())
    return Finding(
        passed,
        f"right in % on PyTorch's attacked images: {_percent(figures)}; PyTorch {100 * ours:.1f}",
    )


def features(trial: Trial) -> Finding:
    """An attack that knows no labels, towards another image's embedding, is not stronger."""
    found, held = _mean(trial.holds(trial.attack("feature"))), _mean(trial.held)
    return Finding(
        found >= held - TOLERANCE,
        f"right in %: under feature matching {100 * found:.1f}, under all attacks {100 * held:.1f}",
    )


CHECKS: dict[str, Callable[[Trial], Finding]] = {
    "falls at a large eps, never rises": falls,
    "gradient health": gradients,
    "transfer is weaker": transfer,
    "beats noise": noise,
    "square is weaker": square,
    "batch invariance": batches,
    "step parity": parity,
    "randomness": randomness,
    "exported precisions": precision,
    "feature matching is weaker": features,
}
