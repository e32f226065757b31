"""Ten checks that a robustness figure must pass before it is trusted.

Each check looks, on the first images of the draw, for one way in which an attack may have failed
although the defence is weak (Carlini et al., arXiv 1902.06705; Athalye et al., ICML 2018; Tramer et
al., NeurIPS 2020). All of them attack by train.robustness.threat, as the measurement does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from edgeclip.purify import MAX_SEED, CosPurifier, DiffPurifier
from train.attacks import cross_entropy, margin
from train.data.loader import split
from train.robustness.defence import Defence, FixedNoise, Transfer, View, correct
from train.robustness.threat import TargetImages, Threat, build

TOLERANCE = 0.002  # difference of accuracies
STEPS = 20  # at most, of attacks that a check repeats for many settings
LARGE = {"linf": 64 / 255, "l2": 8.0}  # an eps at which nothing is recognisable
LIMIT = {"linf": 0.9, "l2": float("inf")}
SMALL_GRADIENT = 1e-3  # as a multiple of the unpurified model's gradient
ZERO_GRADIENTS = 0.05  # share of images
DIRECTIONS, DIFFERENCE = 32, 1e-5  # of finite differences, in float64
AGREEING = 0.99  # cosine
SPREAD = 0.05  # of accuracy, for one purification step more or less
PRECISION = 0.01  # of accuracy, between an exported graph and PyTorch
DRAWS, RESUBMISSIONS, STARTS = 20, 10, 5


class Finding(NamedTuple):
    """Outcome of a check; `passed` is None where it does not apply."""

    passed: bool | None
    figure: str


@dataclass(frozen=True)
class Trial:
    """M images with their attacks, and the measurement's marks for them."""

    defence: Defence
    threat: Threat
    images: Tensor  # (M, 3, H, W) in [0, 1]
    labels: Tensor  # (M,)
    seeds: Tensor  # (M,)
    clean: Tensor  # (M,) booleans: correct without an attack
    robust: Tensor  # (M,) correct under every attack of the measurement
    before_square: Tensor  # (M,) correct under every attack but square
    square: Tensor | None  # (M,) correct under square; None if the measurement did not run it
    targets: TargetImages
    batch_size: int
    surrogate: Defence | None = None  # another model, whose attacks are transferred to this one
    exported: Mapping[str, Callable[[Tensor], Tensor]] | None = (
        None  # precision -> function of images to classes (B,)
    )

    def attack(
        self, name: str, gradient: str = "exact", defence: Defence | None = None, **changes: float
    ) -> Tensor:
        """Return the images after an attack; those misclassified without one stay as they are.

        changes: of the threat. A new eps comes with steps of a quarter of it.
        """
        threat = replace(self.threat, **cast("dict[str, Any]", changes))
        if "eps" in changes:
            threat = replace(threat, step_size=threat.eps / 4)
        attack = build(name, defence or self.defence, gradient, threat, self.targets)
        attacked = self.images.clone()
        for batch in split(self.clean.nonzero().flatten().tolist(), self.batch_size):
            attacked[batch] = attack(self.images[batch], self.labels[batch], self.seeds[batch])
        return attacked

    def still_correct(self, images: Tensor, defence: Defence | None = None) -> Tensor:
        """Return which of the images that are correct without an attack still are, (M,) booleans."""
        batches = self.batches(images)
        return self.clean & torch.cat([correct(defence or self.defence, x, y) for x, y in batches])

    def batches(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return batches of M images and their labels."""
        tensors = (torch.split(x, self.batch_size) for x in (images, self.labels))
        return list(zip(*tensors, strict=True))

    def unpurified(self) -> Defence:
        return Defence(self.defence.model, self.defence.null_text)

    def short(self) -> int:
        """Return the steps of an attack that a check repeats."""
        return min(self.threat.steps, STEPS)


def _percent(accuracies: Mapping[str, float] | list[float]) -> str:
    if isinstance(accuracies, list):
        return ", ".join(f"{100 * value:.1f}" for value in accuracies)
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in accuracies.items())


def _mean(marks: Tensor) -> float:
    return marks.float().mean().item()


def _rises(accuracies: list[float], count: int) -> bool:
    """Return whether accuracy rises with attack strength, by more than one image."""
    slack = max(TOLERANCE, 1 / count) + 1e-9
    return any(after > before + slack for before, after in itertools.pairwise(accuracies))


def falls(trial: Trial) -> Finding:
    """Check that accuracy reaches about 0 at a large eps and never rises with attack strength."""
    eps = trial.threat.eps
    large = max(8 * eps, LARGE[trial.threat.norm])
    sizes = [min(x, LIMIT[trial.threat.norm]) for x in (eps / 4, eps / 2, eps, 2 * eps, large)]
    steps = trial.short()
    by_eps = [
        _mean(trial.still_correct(trial.attack("cw", eps=size, steps=steps))) for size in sizes
    ]
    plain = trial.unpurified()
    attacked = trial.attack("cw", "exact", plain, eps=sizes[-1], steps=steps)
    unpurified = _mean(trial.still_correct(attacked, plain))
    counts = sorted({max(1, steps // 4), max(1, steps // 2), steps})
    by_steps = [
        _mean(trial.still_correct(trial.attack("cw", steps=n, step_size=2.5 * eps / n)))
        for n in counts
    ]
    count = len(trial.images)
    passed = max(by_eps[-1], unpurified) <= 0.01 and not (
        _rises(by_eps, count) or _rises(by_steps, count)
    )
    names = [
        f"{size * 255:g}/255" if trial.threat.norm == "linf" else f"{size:g}" for size in sizes
    ]
    return Finding(
        passed,
        f"right in %: eps {_percent(dict(zip(names, by_eps, strict=True)))}; without purification at "
        f"{names[-1]} {100 * unpurified:.1f}; after {', '.join(map(str, counts))} steps "
        f"{_percent(by_steps)}",
    )


def _gradient(defence: Defence, trial: Trial, loss: Callable[[View, Tensor], Tensor]) -> Tensor:
    """Return the exact gradient of a loss with respect to the images, (M, pixels)."""
    rows = []
    for images, labels in trial.batches(trial.images):
        images = images.clone().requires_grad_()
        value = loss(defence.view(images, "exact"), labels).sum()
        (gradient,) = torch.autograd.grad(value, images, allow_unused=True)
        rows.append(torch.zeros_like(images) if gradient is None else gradient)
    return torch.cat(rows).flatten(1)


def gradients(trial: Trial) -> Finding:
    """Check that gradients are not zero or small, and are those of the evaluated function."""
    by_loss = {
        "cross-entropy": lambda view, labels: cross_entropy(view.logits, labels),
        "margin": lambda view, labels: margin(view.logits, labels),
    }
    defence = FixedNoise(trial.defence, trial.threat.seed) if _random(trial) else trial.defence
    rows = {name: _gradient(defence, trial, loss) for name, loss in by_loss.items()}
    zero = max(_mean((gradient == 0).all(1)) for gradient in rows.values())
    plain = _gradient(trial.unpurified(), trial, by_loss["margin"])
    ratio = (rows["margin"].norm(dim=1) / plain.norm(dim=1).clamp(min=1e-30)).median().item()
    cosine = _finite_difference_cosine(defence, trial, rows["margin"])
    passed = zero <= ZERO_GRADIENTS and ratio >= SMALL_GRADIENT and cosine >= AGREEING
    return Finding(
        passed,
        f"zero gradients {100 * zero:.1f} %; norm {ratio:.3g} of the plain model's; cosine with "
        f"float64 finite differences {cosine:.4f}",
    )


def _random(trial: Trial) -> bool:
    """Return whether the defence answers differently when asked twice."""
    with torch.no_grad():
        return not torch.equal(trial.defence(trial.images), trial.defence(trial.images))


def _finite_difference_cosine(defence: Defence, trial: Trial, gradient: Tensor) -> float:
    """Return the median cosine of slopes along random directions, by differences and by gradient."""
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
    """Check that transferred attacks are no stronger than attacks on the defence itself."""
    figures = {}
    if trial.defence.purifier is not None:
        attacked = trial.attack("cw", "encoder")
        figures["from the unpurified model"] = _mean(trial.still_correct(attacked))
    if trial.surrogate is not None:
        attacked = trial.attack("cw", "exact", Transfer(trial.defence, trial.surrogate).eval())
        figures["from another model"] = _mean(trial.still_correct(attacked))
    if not figures:
        return Finding(None, "no purification, and no other model by --transfer-from")
    robust = _mean(trial.robust)
    passed = min(figures.values()) >= robust - TOLERANCE
    return Finding(passed, f"right in %: {_percent(figures)}; under all attacks {100 * robust:.1f}")


def noise(trial: Trial) -> Finding:
    """Check that the attack is stronger than noise of the same size."""
    rng = torch.Generator().manual_seed(trial.threat.seed)
    robust = trial.clean
    for _ in range(STARTS):
        noise = torch.randn(trial.images.shape, generator=rng).to(trial.images)
        if trial.threat.norm == "linf":
            delta = trial.threat.eps * noise.sign()
        else:
            delta = trial.threat.eps * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        robust = robust & trial.still_correct((trial.images + delta).clamp(0, 1))
    floor, attacked = _mean(robust), _mean(trial.robust)
    passed = attacked <= max(floor - 0.02, 0.02)
    text = f"right in %: under the worst of {STARTS} random starts {100 * floor:.1f}, under attack "
    return Finding(passed, text + f"{100 * attacked:.1f}")


def square(trial: Trial) -> Finding:
    """Check that square, which needs no gradient, is no stronger than the attacks that use it."""
    marks, queries = trial.square, trial.threat.queries
    if marks is None:
        queries = min(queries, 1000)
        marks = trial.still_correct(trial.attack("square", queries=queries))
    else:
        marks = trial.before_square & marks
    black, white = _mean(marks), _mean(trial.before_square)
    return Finding(
        black >= white - TOLERANCE,
        f"right in %: under square with {queries} queries {100 * black:.1f}, under the attacks that "
        f"use gradients {100 * white:.1f}",
    )


def batches(trial: Trial) -> Finding:
    """Check that an image's logits do not depend on the other images of its batch."""
    images = trial.images[:32]
    scale = trial.defence.model.logit_scale.item()
    with torch.no_grad():
        whole = trial.defence(images)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        order = order.to(images.device)
        others = {
            "1": torch.cat([trial.defence(batch) for batch in torch.split(images, 1)]),
            "2": torch.cat([trial.defence(batch) for batch in torch.split(images, 2)]),
            "permuted": trial.defence(images[order])[order.argsort()],
        }
    differences = {name: ((x - whole).abs().max() / scale).item() for name, x in others.items()}
    passed = max(differences.values()) <= 1e-4
    shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return Finding(passed, f"largest difference of cosines from a batch of {len(images)}: {shown}")


def parity(trial: Trial) -> Finding:
    """Check that one purification step more or less changes accuracy little."""
    purifier = trial.defence.purifier
    if purifier is None:
        return Finding(None, "no purification")
    counts = [max(purifier.steps + k, 0) for k in (-1, 0, 1)]
    sizes = sorted({0.1, 1.0, 10.0, 30.0, purifier.step_size})
    shown, spread = [], 0.0
    for size in sizes:
        pairs = [_with(trial, replace(purifier, steps=n, step_size=size)) for n in counts]
        cells = ", ".join(f"{100 * clean:.0f}/{100 * robust:.0f}" for clean, robust in pairs)
        shown.append(f"{size:g}: {cells}")
        if size == purifier.step_size:
            spread = max(max(values) - min(values) for values in zip(*pairs, strict=True))
    steps = ", ".join(map(str, counts))
    return Finding(
        spread <= SPREAD,
        f"right in % as they are/under attack after {steps} steps of size {'; '.join(shown)}",
    )


def _with(trial: Trial, purifier: CosPurifier | DiffPurifier) -> tuple[float, float]:
    """Return accuracy with another purification, without an attack and under a short one."""
    other = copy.copy(trial.defence)
    other.purifier = purifier
    clean = correct(other, trial.images, trial.labels)
    changed = replace(trial, defence=other, clean=clean)
    return _mean(clean), _mean(
        changed.still_correct(changed.attack("cw", steps=min(trial.short(), 10)))
    )


def randomness(trial: Trial) -> Finding:
    """Check that a random defence gains nothing from its noise: EOT, known noise, resubmission."""
    if isinstance(trial.defence.purifier, DiffPurifier):
        return _seeds(trial, trial.defence.purifier)
    if not _random(trial):
        return Finding(True, "the same answer twice, to the last bit")
    steps = trial.short()
    average = trial.attack("cw", steps=steps, eot=DRAWS)
    fixed = FixedNoise(trial.defence, trial.threat.seed).eval()
    known = trial.attack("cw", "exact", fixed, steps=steps)
    resubmitted = trial.robust
    for _ in range(RESUBMISSIONS):
        resubmitted = resubmitted & trial.still_correct(average)
    figures = {
        f"EOT with {DRAWS} draws": _mean(trial.still_correct(average)),
        "with its noise known": _mean(trial.still_correct(known, fixed)),
        f"worst of {RESUBMISSIONS} submissions": _mean(resubmitted),
    }
    robust = _mean(trial.robust)
    passed = trial.threat.eot >= DRAWS and robust <= min(figures.values()) + TOLERANCE
    return Finding(
        passed,
        f"random; right in %: {_percent(figures)}; measured {100 * robust:.1f} with "
        f"{trial.threat.eot} draws per step",
    )


def _seeds(trial: Trial, purifier: DiffPurifier) -> Finding:
    """Check CLIPure-Diff, whose noise depends on its seed alone: known, unknown, and drawn again."""
    steps = trial.short()
    known = trial.attack("cw", steps=steps, eot=1)
    resubmitted = trial.clean
    for seed in range(purifier.seed + 1, purifier.seed + 1 + RESUBMISSIONS):
        other = copy.copy(trial.defence)
        other.purifier = replace(purifier, seed=seed % (MAX_SEED + 1))
        resubmitted = resubmitted & trial.still_correct(known, other)
    figures = {
        "the seed known": _mean(trial.still_correct(known)),
        f"EOT with {DRAWS} draws of it": _mean(
            trial.still_correct(trial.attack("cw", steps=steps, eot=DRAWS))
        ),
    }
    robust = _mean(trial.robust)
    return Finding(
        not _random(trial) and robust <= min(figures.values()) + TOLERANCE,
        f"right in %: {_percent(figures)}; under all attacks {100 * robust:.1f}; with the seed known, "
        f"by {RESUBMISSIONS} other seeds in turn {100 * _mean(resubmitted):.1f}",
    )


def precision(trial: Trial) -> Finding:
    """Check that attacks on the model in PyTorch succeed on the exported graphs alike."""
    if trial.exported is None:
        return Finding(None, "no bundle: nothing is exported")
    attacked = trial.attack("cw")
    pytorch = _mean(trial.still_correct(attacked))
    figures = {
        name: _mean(trial.clean & (classes(attacked) == trial.labels))
        for name, classes in trial.exported.items()
    }
    passed = all(abs(value - pytorch) <= PRECISION + 1e-9 for value in figures.values())
    return Finding(
        passed,
        f"right in % on PyTorch's attacked images: {_percent(figures)}; PyTorch {100 * pytorch:.1f}",
    )


def features(trial: Trial) -> Finding:
    """Check that feature matching, an attack towards another image's embedding, is no stronger."""
    feature, robust = _mean(trial.still_correct(trial.attack("feature"))), _mean(trial.robust)
    return Finding(
        feature >= robust - TOLERANCE,
        f"right in %: under feature matching {100 * feature:.1f}, under all attacks "
        f"{100 * robust:.1f}",
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
