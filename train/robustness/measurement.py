"""One process's share of a measurement: load, check that it is the right thing, attack, check."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import edgeclip
from edgeclip import purify
from edgeclip.cli.options import PurifierOptions
from edgeclip.purify import DiffPurifier, Purifier
from train.data import dataset
from train.data.loader import Pictures, batches, draw, split
from train.errors import SettingsError
from train.models.wording import image_spec
from train.robustness.checks import CHECKS, Trial
from train.robustness.defence import Defence, right
from train.robustness.recorder import Results
from train.robustness.subjects import Shipped, Subject, agreement, open_subject
from train.robustness.threat import Bank, Threat, build, plan
from train.run.processes import device_name, main_first

PURIFIER = PurifierOptions(prefix="purify-", published=True)
FIRST = 100  # images that a bundle's runtime is compared on, and that "feature" aims at
MOST_PROCESSES = 1024  # that an earlier run may have left files of


def describe(
    args: argparse.Namespace, subject: Subject, defence: Defence, count: int
) -> dict[str, Any]:
    """Everything needed to run it again, and to tell whether a result file is of this run."""
    names = ("torch", "torchattacks", "open_clip_torch")
    versions = {name: version(name) for name in names}
    versions |= {"edgeclip": edgeclip.__version__, "python": platform.python_version()}
    given = ("subject", "pretrained", "visual", "checkpoint", "data", "norm", "eps", "steps",
             "restarts", "queries", "eot", "seed", "batch_size", "transfer_from")  # fmt: skip
    return {name: getattr(args, name) for name in given} | {
        "weights_sha256": subject.source.weights_sha256,
        "quick_gelu": subject.source.quick_gelu or None,  # older files lack the key
        "templates": list(subject.templates),
        "null_templates": list(subject.null_templates),
        "purification": _purification(subject, defence.purifier),
        "attack": list(dict.fromkeys(args.attack)),
        "gradient": [g for g in defence.gradients if g in args.gradient or not defence.purifier],
        "step_size": args.eps / 4 if args.step_size is None else args.step_size,
        "samples": count,
        "check_samples": args.check_samples,
        "versions": versions,
    }


def _purification(subject: Subject, purifier: Purifier) -> dict[str, Any] | None:
    told = purify.to_dict(purifier)
    if told is not None and isinstance(purifier, DiffPurifier) and subject.prior is not None:
        prior = {"prior_sha256": subject.prior.weights_sha256, "gradient": subject.prior_gradient}
        told |= prior | {"timesteps": list(purifier.timesteps)}  # as JSON has it
    return told


class Measurement:
    """One process's share of a measurement."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device):
        self.rank, self.world, self.device = rank, world, device
        with main_first(rank):
            self.test_set = dataset.load(args.data, train=False, download=args.download)
        classes = self.test_set.classes
        self.subject = open_subject(
            args.subject,
            args.pretrained,
            args.checkpoint,
            args.template,
            args.prior,
            args.visual,
            args.quickgelu,
        )
        bundle = self.subject.bundle
        recommended = None if bundle is None else bundle.manifest.purification
        purifier = PURIFIER.purifier(args, recommended)
        self.defence = self.subject.defence(classes, purifier).to(device)
        self.surrogate = None
        if args.transfer_from:
            other = open_subject(args.transfer_from)
            if image_spec(other.source.model).size != image_spec(self.subject.source.model).size:
                raise SettingsError(f"{args.transfer_from} takes images of another size")
            self.surrogate = other.defence(classes, None).to(device)
        # What is drawn first does not depend on how much is drawn.
        order = draw(len(self.test_set), max(args.samples, FIRST), args.seed)
        self.keys = order[: args.samples]
        self.pictures = Pictures(self.test_set, self.subject.source.model.visual)
        settings = describe(args, self.subject, self.defence, len(self.keys))
        self.threat = Threat(**{
            name: settings[name]
            for name in ("norm", "eps", "steps", "step_size", "restarts", "queries", "eot", "seed")
        })  # fmt: skip
        self.results = Results(
            settings,
            plan(settings["attack"], settings["gradient"], len(classes)),
            devices=[device_name(device)],
        )
        self.out = args.out
        self.own = args.out if rank == 0 else _part(args.out, rank)
        self.bank = Bank.of(self.defence, *self.load(order[:FIRST])[:2])
        self.attacks = {
            stage.key: build(stage.attack, self.defence, stage.gradient, self.threat, self.bank)
            for stage in self.results.stages
        }

    def load(self, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """Images, labels and seeds."""
        ((*batch,),) = batches(self.pictures, [keys], workers=0)
        return tuple(x.to(self.device) for x in batch)

    @cached_property
    def shipped(self) -> dict[str, Shipped]:
        """The bundle's own runtime, by precision; nothing where the subject is no bundle."""
        bundle = self.subject.bundle
        precisions = bundle.manifest.precisions if bundle else ()
        classes, purifier = self.test_set.classes, self.defence.purifier
        return {name: Shipped(self.subject, classes, purifier, name) for name in precisions}

    def agree(self) -> None:
        """Before anything is attacked: does the bundle compute what is attacked?"""
        keys = self.keys[:FIRST]
        if "fp32" in self.shipped:  # of the others the ninth check tells how far they are
            raw = [self.test_set[index][0] for index, _ in keys]
            shown = self.load(keys)[0]
            self.results.agreement = agreement(self.shipped["fp32"], self.defence, raw, shown)

    def resume(self) -> None:
        """Read what earlier runs of the same command found, in any number of processes."""
        files = [self.own]
        if self.rank == 0:  # and of processes that there are no longer
            parts = (_part(self.out, rank) for rank in range(self.world, MOST_PROCESSES))
            files += [part for part in parts if part.is_file()]
        for file in files:
            if file.is_file():
                self.results.read(file)
        self.gather(files)
        if self.rank > 0:  # the first process counts the time that was spent before
            self.results.seconds = dict.fromkeys(self.results.seconds, 0.0)

    def gather(self, files: Sequence[Path] = ()) -> None:
        """What all processes found into the one file; then the others' files may go."""
        self.results.gather()
        with main_first(self.rank):
            if self.rank == 0:
                self.results.write(self.out)
        for file in (self.own, *files):
            if file != self.out:
                file.unlink(missing_ok=True)

    def attack(self, progress: Progress) -> None:
        """Every stage, on this process's batches, each of which is finished before the next."""
        parts = split(range(len(self.keys)), self.results.settings["batch_size"])
        mine = parts[self.rank :: self.world]
        todo = [places for places in mine if self.missing(places)]
        total, left = (sum(map(len, x)) for x in (mine, todo))
        bar = progress.add_task("", total=total, completed=total - left, cost="")
        start, done = time.monotonic(), 0
        for places in todo:
            self.batch(places, lambda key: progress.update(bar, description=key))
            done += len(places)
            cost = (time.monotonic() - start) / done
            wait = timedelta(seconds=round(cost * (left - done)))
            progress.update(bar, advance=len(places), cost=f"{cost:.2g} s per image, {wait} left")

    def missing(self, places: Sequence[int]) -> list[str]:
        """The keys of the marks that these images lack."""
        return [key for key in self.results.marks if self.results.waits(key, places)]

    def batch(self, places: Sequence[int], say: Callable[[str], None]) -> None:
        """The marks that are missing of one batch."""
        missing = self.missing(places)
        images, labels, seeds = self.load([self.keys[i] for i in places])
        if "clean" in missing:
            self.mark("clean", places, images, labels, places, time.monotonic())
        for stage in self.results.stages:
            if stage.key not in missing:
                continue
            say(stage.key)
            start = time.monotonic()
            left = self.results.right(stage.after, places)
            chosen = torch.tensor([i - places[0] for i in left], device=self.device).long()
            shown = images[chosen]
            if left:
                shown = self.attacks[stage.key](shown, labels[chosen], seeds[chosen])
            self.mark(stage.key, places, shown, labels[chosen], left, start)

    def mark(
        self,
        key: str,
        places: Sequence[int],
        images: torch.Tensor,
        labels: torch.Tensor,
        left: Sequence[int],
        start: float,
    ) -> None:
        marks = right(self.defence, images, labels).tolist() if len(left) else []
        good = [i for i, mark in zip(left, marks, strict=True) if mark]
        self.results.put(key, places, good, time.monotonic() - start)
        self.results.write(self.own)

    def check(self, progress: Progress) -> None:
        """The ten checks, on the first images; what is done already stays."""
        count = min(self.results.settings["check_samples"], len(self.keys))
        done = {row["name"] for row in self.results.checks}
        left = [name for name in CHECKS if name not in done] if count else []
        if not left:
            return
        trial = self.trial(count)
        bar = progress.add_task("checks", total=len(left), cost="")
        for name in left:
            progress.update(bar, description=f"check: {name}")
            finding = CHECKS[name](trial)
            row = {"name": name, "passed": finding.passed, "figure": finding.figure}
            self.results.checks.append(row)
            self.results.checks.sort(key=lambda row: list(CHECKS).index(row["name"]))
            self.results.write(self.out)
            progress.advance(bar)

    def trial(self, count: int) -> Trial:
        results, stages = self.results, self.results.stages

        def marks(keys: Sequence[str]) -> torch.Tensor:
            rows = [[results.marks[key][i] == "1" for key in keys] for i in range(count)]
            return torch.tensor([all(row) for row in rows], device=self.device)

        squares = [stage.key for stage in stages if stage.attack == "square"]
        others = [stage.key for stage in stages if stage.attack != "square"]
        images, labels, seeds = self.load(self.keys[:count])
        return Trial(
            self.defence, self.threat, images, labels, seeds,
            clean=marks(["clean"]),
            held=marks(["clean", *others, *squares]),
            before_square=marks(["clean", *others]),
            square=marks(squares) if squares else None,
            bank=self.bank,
            batch_size=results.settings["batch_size"],
            surrogate=self.surrogate,
            shipped={name: x.answers for name, x in self.shipped.items()} or None,
        )  # fmt: skip


def _part(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank{rank}")
