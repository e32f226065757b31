"""Measurement of accuracy under attack, split over processes: load, attack, check, record."""

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
from train.robustness.defence import Defence, correct
from train.robustness.recorder import Recorder
from train.robustness.result_file import CLEAN, CORRECT
from train.robustness.subjects import BundleClassifier, Subject, agreement, open_subject
from train.robustness.threat import TargetImages, Threat, build, plan
from train.run.processes import device_name, main_first

PURIFIER = PurifierOptions(prefix="purify-", published=True)
FIRST = 100  # images for the comparison with a bundle's runtime, and as targets of "feature"
MAX_PROCESSES = 1024  # of an earlier run, which may have left files


def describe(
    args: argparse.Namespace, subject: Subject, defence: Defence, count: int
) -> dict[str, Any]:
    """Return the settings of a result file: all that a repetition needs, and all that a resume compares."""
    names = ("torch", "torchattacks", "open_clip_torch")
    versions = {name: version(name) for name in names}
    versions |= {"edgeclip": edgeclip.__version__, "python": platform.python_version()}
    options = ("subject", "pretrained", "visual", "checkpoint", "data", "norm", "eps", "steps",
               "restarts", "queries", "eot", "seed", "batch_size", "transfer_from")  # fmt: skip
    return {name: getattr(args, name) for name in options} | {
        "weights_sha256": subject.source.weights_sha256,
        "quick_gelu": subject.source.quick_gelu,
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
    record = purify.to_dict(purifier)
    if record is not None and isinstance(purifier, DiffPurifier) and subject.prior is not None:
        prior = {"prior_sha256": subject.prior.weights_sha256, "gradient": subject.prior_gradient}
        record |= prior | {"timesteps": list(purifier.timesteps)}  # JSON has no tuples
    return record


class Measurement:
    """One process's share of a measurement, recorded in a result file."""

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
        # The first images of a draw do not depend on its length.
        order = draw(len(self.test_set), max(args.samples, FIRST), args.seed)
        self.keys = order[: args.samples]
        self.pictures = Pictures(self.test_set, self.subject.source.model.visual)
        settings = describe(args, self.subject, self.defence, len(self.keys))
        self.threat = Threat(**{
            name: settings[name]
            for name in ("norm", "eps", "steps", "step_size", "restarts", "queries", "eot", "seed")
        })  # fmt: skip
        self.recorder = Recorder(
            settings,
            plan(settings["attack"], settings["gradient"], len(classes)),
            [device_name(device)],
        )
        self.out = args.out
        self.rank_out = args.out if rank == 0 else _rank_file(args.out, rank)
        images, labels, _ = self.load(order[:FIRST])
        self.targets = TargetImages.embed(self.defence, images, labels)
        self.attacks = {
            stage.key: build(stage.attack, self.defence, stage.gradient, self.threat, self.targets)
            for stage in self.recorder.stages
        }

    def load(self, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
        """Return the images, labels and seeds of keys of the draw."""
        ((*batch,),) = batches(self.pictures, [list(keys)], workers=0)
        return tuple(x.to(self.device) for x in batch)

    @cached_property
    def exported(self) -> dict[str, BundleClassifier]:
        """Bundle run by its own runtime, by precision; empty where the subject is not a bundle."""
        bundle = self.subject.bundle
        precisions = bundle.manifest.precisions if bundle else ()
        classes, purifier = self.test_set.classes, self.defence.purifier
        return {p: BundleClassifier(self.subject, classes, purifier, p) for p in precisions}

    def check_agreement(self) -> None:
        """Compare a bundle's runtime with the attacked model. Raises SettingsError if they differ."""
        if "fp32" in self.exported:  # the ninth check compares the other precisions
            keys = self.keys[:FIRST]
            raw = [self.test_set[index][0] for index, _ in keys]
            images = self.load(keys)[0]
            self.recorder.agreement = agreement(self.exported["fp32"], self.defence, raw, images)

    def resume(self) -> None:
        """Read the results of earlier runs of this command, with any number of processes."""
        files = [self.rank_out]
        if self.rank == 0:  # files of ranks that no longer exist too
            ranks = range(self.world, MAX_PROCESSES)
            files += [file for file in (_rank_file(self.out, r) for r in ranks) if file.is_file()]
        for file in files:
            if file.is_file():
                self.recorder.read(file)
        self.gather(files)
        if self.rank > 0:  # the first process counts the time that was spent before
            self.recorder.seconds = dict.fromkeys(self.recorder.seconds, 0.0)

    def gather(self, files: Sequence[Path] = ()) -> None:
        """Write the marks of all processes to one file, and remove the files of the other ranks."""
        self.recorder.gather()
        with main_first(self.rank):
            if self.rank == 0:
                self.recorder.write(self.out)
        for file in (self.rank_out, *files):
            if file != self.out:
                file.unlink(missing_ok=True)

    def attack(self, progress: Progress) -> None:
        """Run every stage on this process's batches; a batch is finished before the next starts."""
        every = split(range(len(self.keys)), self.recorder.settings["batch_size"])
        assigned = every[self.rank :: self.world]
        unfinished = [places for places in assigned if self.missing(places)]
        total, left = (sum(map(len, x)) for x in (assigned, unfinished))
        bar = progress.add_task("", total=total, completed=total - left, cost="")
        start, done = time.monotonic(), 0
        for places in unfinished:
            self.attack_batch(places, lambda key: progress.update(bar, description=key))
            done += len(places)
            cost = (time.monotonic() - start) / done
            wait = timedelta(seconds=round(cost * (left - done)))
            progress.update(bar, advance=len(places), cost=f"{cost:.2g} s per image, {wait} left")

    def missing(self, places: Sequence[int]) -> list[str]:
        """Return the keys of the stages that some of these images still wait for."""
        return [key for key in self.recorder.marks if self.recorder.is_waiting(key, places)]

    def attack_batch(self, places: Sequence[int], show_stage: Callable[[str], None]) -> None:
        """Run the missing stages on one batch."""
        missing = self.missing(places)
        images, labels, seeds = self.load([self.keys[i] for i in places])
        if CLEAN in missing:
            self.record(CLEAN, places, images, labels, places, time.monotonic())
        for stage in self.recorder.stages:
            if stage.key not in missing:
                continue
            show_stage(stage.key)
            start = time.monotonic()
            left = self.recorder.correct(stage.after, places)
            rows = torch.tensor([i - places[0] for i in left], device=self.device).long()
            attacked = images[rows]
            if left:
                attacked = self.attacks[stage.key](attacked, labels[rows], seeds[rows])
            self.record(stage.key, places, attacked, labels[rows], left, start)

    def record(
        self,
        key: str,
        places: Sequence[int],
        images: torch.Tensor,
        labels: torch.Tensor,
        left: Sequence[int],
        start: float,
    ) -> None:
        """Classify the images of the places `left`, and record the batch; all others are wrong."""
        marks = correct(self.defence, images, labels).tolist() if len(left) else []
        good = [i for i, mark in zip(left, marks, strict=True) if mark]
        self.recorder.put(key, places, good, time.monotonic() - start)
        self.recorder.write(self.rank_out)

    def check(self, progress: Progress) -> None:
        """Run the checks that the result file lacks, on the first images."""
        count = min(self.recorder.settings["check_samples"], len(self.keys))
        done = {check["name"] for check in self.recorder.checks}
        left = [name for name in CHECKS if name not in done] if count else []
        if not left:
            return
        trial = self.trial(count)
        bar = progress.add_task("checks", total=len(left), cost="")
        for name in left:
            progress.update(bar, description=f"check: {name}")
            passed, figure = CHECKS[name](trial)
            self.recorder.checks.append({"name": name, "passed": passed, "figure": figure})
            self.recorder.checks.sort(key=lambda check: list(CHECKS).index(check["name"]))
            self.recorder.write(self.out)
            progress.advance(bar)

    def trial(self, count: int) -> Trial:
        """Return the first images, with their marks, for the checks."""
        recorder, stages = self.recorder, self.recorder.stages

        def marks(keys: Sequence[str]) -> torch.Tensor:
            rows = [[recorder.marks[key][i] == CORRECT for key in keys] for i in range(count)]
            return torch.tensor([all(row) for row in rows], device=self.device)

        squares = [stage.key for stage in stages if stage.attack == "square"]
        others = [stage.key for stage in stages if stage.attack != "square"]
        images, labels, seeds = self.load(self.keys[:count])
        return Trial(
            self.defence, self.threat, images, labels, seeds,
            clean=marks([CLEAN]),
            robust=marks([CLEAN, *others, *squares]),
            before_square=marks([CLEAN, *others]),
            square=marks(squares) if squares else None,
            targets=self.targets,
            batch_size=recorder.settings["batch_size"],
            surrogate=self.surrogate,
            exported={name: x.classes for name, x in self.exported.items()} or None,
        )  # fmt: skip


def _rank_file(out: Path, rank: int) -> Path:
    return out.with_name(f"{out.name}.rank{rank}")
