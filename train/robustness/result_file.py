"""Result file of an evaluation, read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.purify import DiffPurifier, Purifier, from_dict
from train.errors import SettingsError
from train.robustness.defence import GRADIENTS

NEEDED = ("subject", "data", "norm", "eps", "seed", "samples", "attack", "steps", "restarts")
CHECKS = 10  # that a figure must pass
ENOUGH = 1000  # images for a figure that is published
PASSED = {True: "yes", False: "**NO**", None: "n/a"}


@dataclass(frozen=True)
class Result:
    """A result file. Marks are (n,) booleans: whether each finished image is named rightly."""

    settings: dict[str, Any]
    wanted: int  # images of the draw
    images: np.ndarray  # (n,) places in the draw of those on which every attack is done
    clean: np.ndarray
    stages: dict[tuple[str, str], dict[str, np.ndarray]]  # (attack, gradient) -> stage -> marks
    seconds: dict[str, float]  # per image
    checks: list[dict[str, Any]]  # name, figure, and passed: None where it does not apply
    purifier: Purifier = None
    devices: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """As the settings name it, with what tells its weights."""
        settings = self.settings
        name = " ".join(
            filter(None, (settings["subject"], settings.get("pretrained"), settings.get("visual")))
        )
        return f"{name} ({settings['checkpoint']})" if settings.get("checkpoint") else name

    @property
    def purification(self) -> str:
        return str(self.purifier or "none") + self._forward

    @property
    def _forward(self) -> str:
        """What tells a bundle's approximate prior gradient from the exact one."""
        told = self.settings.get("purification")
        forward = isinstance(told, dict) and told.get("gradient") == "forward"
        return ", forward gradient" if forward else ""

    @property
    def prior(self) -> str | None:
        told = self.settings.get("purification")
        return told.get("prior_sha256") if isinstance(told, dict) else None

    @property
    def method(self) -> str:
        """The purification without its steps and their size."""
        own = self.purifier
        if isinstance(own, DiffPurifier):
            times = "timesteps {} to {}".format(*own.timesteps)
            return f"CLIPure-Diff, {times}, seed {own.seed}{self._forward}"
        return "CLIPure-Cos" if own else ""

    @property
    def setting(self) -> tuple[int, float]:
        """Steps of the purification and their size."""
        return (self.purifier.steps, self.purifier.step_size) if self.purifier else (0, 0)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.purification}" if self.purifier else self.model

    @property
    def size(self) -> str:
        """eps as one reads it, with its norm."""
        norm, eps = self.settings["norm"], self.settings["eps"]
        return f"{norm} eps {eps * 255:g}/255" if norm == "linf" else f"{norm} eps {eps:g}"

    @property
    def title(self) -> str:
        return f"{self.settings['data']}, {self.size}, seed {self.settings['seed']}"

    @property
    def count(self) -> str:
        done = len(self.images)
        text = str(done) if done == self.wanted else f"{done} of {self.wanted}"
        return text if done >= ENOUGH else f"**{text}**"

    @property
    def budget(self) -> str:
        """What the attacker had."""
        attacks, settings = dict.fromkeys(attack for attack, _ in self.stages), self.settings
        parts = [", ".join(attacks), f"{settings['steps']} steps"]
        if settings.get("queries") and {"autoattack", "square"} & attacks.keys():
            parts.append(f"{settings['queries']} queries")
        if settings.get("eot", 1) > 1:
            parts.append(f"EOT {settings['eot']}")
        return "; ".join([*parts, f"restarts {settings['restarts']}"])

    @property
    def attacks(self) -> dict[tuple[str, str], np.ndarray]:
        """(attack, gradient) -> marks; of stages an image has to withstand each."""
        return {key: np.logical_and.reduce(list(s.values())) for key, s in self.stages.items()}

    @property
    def modes(self) -> dict[str, np.ndarray]:
        """Gradient -> marks: each image at its worst over all attacks that use that gradient."""
        marks: dict[str, np.ndarray] = {}
        for (_, gradient), found in self.attacks.items():
            marks[gradient] = marks.get(gradient, True) & found
        return {gradient: marks[gradient] for gradient in GRADIENTS if gradient in marks}

    @property
    def worst(self) -> np.ndarray:
        return np.logical_and.reduce([self.clean, *self.attacks.values()])

    @property
    def masking(self) -> float | None:
        """How much better it looks by the gradient of the released code than by the others."""
        shares = {mode: marks.mean() for mode, marks in self.modes.items()}
        released = shares.pop("released", None)
        return released - min(shares.values()) if released is not None and shares else None

    @property
    def failed(self) -> list[int]:
        return [i for i, check in enumerate(self.checks, 1) if check["passed"] is False]

    @property
    def believed(self) -> bool:
        return len(self.checks) >= CHECKS and not self.failed

    @property
    def verdict(self) -> str:
        if self.believed:
            applied = sum(check["passed"] is not None for check in self.checks)
            other = len(self.checks) - applied
            return f"{applied}/{applied} passed" + (f", {other} n/a" if other else "")
        told = ["FAILED: " + ", ".join(map(str, self.failed))] if self.failed else []
        if len(self.checks) < CHECKS:
            told.append("UNFINISHED" if self.checks else "NOT CHECKED")
        return "; ".join(told)


def read(path: Path, first: int | None = None) -> Result:
    """A result file, or what it holds of the `first` images of its draw. Raises SettingsError."""
    try:
        return _result(json.loads(path.read_text(encoding="utf-8")), first)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as err:
        why = f"no {err}" if isinstance(err, KeyError) else str(err)
        raise SettingsError(f"{path} is no result of python -m train.evaluate: {why}") from err
    except SettingsError as err:
        raise SettingsError(f"{path}: {err}") from err


def _result(found: dict[str, Any], first: int | None) -> Result:
    settings, samples = found["settings"], found["samples"]
    missing = [name for name in NEEDED if name not in settings]
    if missing:
        raise ValueError(f"no {', '.join(missing)} among its settings")
    if any(set(text) - set("01?") or len(text) > settings["samples"] for text in samples.values()):
        raise ValueError("its marks are not one of 1, 0 and ? for each image")
    # Older files have no "?": their marks end where the attack was stopped.
    texts = {key: text.ljust(settings["samples"], "?") for key, text in samples.items()}
    wanted = settings["samples"] if first is None else first
    table = np.array([list(text) for text in texts.values()])
    finished = np.flatnonzero((table != "?").all(0))
    images = finished[finished < wanted]
    marks = dict(zip(texts, table[:, images] == "1", strict=True))
    clean, stages = marks.pop("clean"), {}
    for key, found_by in marks.items():
        attack, stage, gradient = _parse(key)
        stages.setdefault((attack, gradient), {})[stage] = found_by
    if not len(images) or not set(settings["attack"]) <= {attack for attack, _ in stages}:
        raise SettingsError("no image is finished yet: let its python -m train.evaluate go on")
    if first is not None and len(images) < first:
        raise SettingsError(f"of its first {first} images only {len(images)} are finished")
    seconds = {key: s / len(finished) for key, s in (found.get("seconds") or {}).items()}
    checks = found.get("checks") or []
    if any(check["passed"] not in PASSED or {"name", "figure"} - check.keys() for check in checks):
        raise ValueError("a check has no name, figure or result")
    devices = tuple(found.get("devices") or ())
    told = settings.get("purification")
    purifier = None if told == "none" else from_dict(told)
    return Result(settings, wanted, images, clean, stages, seconds, checks, purifier, devices)


def _parse(key: str) -> tuple[str, str, str]:
    """Attack, stage and gradient of "apgd-ce/exact" or "autoattack square/exact"."""
    name, _, gradient = key.partition("/")
    attack, _, stage = name.partition(" ")
    return attack, stage, gradient or "exact"
