"""Result files of python -m train.evaluate: their format, and the only code that reads them.

A result file is JSON. "samples" has a row of marks for the clean images and for each stage of the
attacks, with a mark for each image of the draw: 1 (correct), 0 (wrong) or ? (not attacked yet). Every
figure is over the finished images, which have no ? in any row. An export reads these files too: this
module imports neither PyTorch nor anything else of the train extra.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgeclip.purify import DiffPurifier, Purifier, from_dict
from train.errors import SettingsError

# encoder: the attack sees the model without its purification, and the whole model is evaluated.
GRADIENTS = ("exact", "identity", "encoder", "released")
CORRECT, WRONG, WAITING = "1", "0", "?"
CLEAN = "clean"  # key of the marks of the images before any attack
REQUIRED_SETTINGS = (
    "subject", "pretrained", "visual", "checkpoint", "weights_sha256", "quick_gelu", "templates",
    "purification", "data", "samples", "seed", "norm", "eps", "attack", "gradient", "steps",
    "restarts", "queries", "eot",
)  # fmt: skip
CHECK_COUNT = 10  # checks that a figure must pass
MIN_IMAGES = 1000  # images of a figure that is published

Marks = NDArray[np.bool_]


class Check(TypedDict):
    """Outcome of one check; `passed` is None where the check does not apply."""

    name: str
    passed: bool | None
    figure: str


def stage_key(attack: str, gradient: str, stage: str = "") -> str:
    """Return the key of a stage's marks: "pgd/exact", or "autoattack/square/exact" in a cascade."""
    return "/".join(filter(None, (attack, stage, gradient)))


def parse_key(key: str) -> tuple[str, str, str]:
    """Return the attack, the gradient and the stage ("" outside a cascade) of a key."""
    attack, *middle, gradient = key.split("/")
    (stage,) = middle or ("",)
    return attack, gradient, stage


@dataclass(frozen=True)
class Result:
    """Measurement of one model under attack, finished or not.

    marks: a mark for each image of the draw, by key: CLEAN and the keys of the stages. seconds: time
    spent in total, by the same keys. agreement: largest difference in probability between a bundle's
    runtime and its checkpoint in PyTorch; None without a bundle. devices: names of the hardware.
    """

    settings: dict[str, Any]
    marks: dict[str, str]
    seconds: dict[str, float]
    checks: list[Check]
    agreement: float | None = None
    devices: tuple[str, ...] = ()

    @cached_property
    def _codes(self) -> NDArray[np.uint8]:
        """Characters of the marks (keys, images)."""
        return np.array([np.frombuffer(row.encode(), np.uint8) for row in self.marks.values()])

    @cached_property
    def finished(self) -> NDArray[np.intp]:
        """Indices of the finished images in the draw, (n,)."""
        return np.flatnonzero((self._codes != ord(WAITING)).all(0))

    @cached_property
    def _correct(self) -> dict[str, Marks]:
        """Marks of the finished images (n,), by key."""
        rows = self._codes[:, self.finished] == ord(CORRECT)
        return dict(zip(self.marks, rows, strict=True))

    @property
    def clean(self) -> Marks:
        """Finished images (n,) that are correct without an attack."""
        return self._correct[CLEAN]

    @cached_property
    def stages(self) -> dict[tuple[str, str], dict[str, Marks]]:
        """Finished images (n,) that stay correct, by (attack, gradient) and stage."""
        stages: dict[tuple[str, str], dict[str, Marks]] = {}
        for key, marks in self._correct.items():
            if key != CLEAN:
                attack, gradient, stage = parse_key(key)
                stages.setdefault((attack, gradient), {})[stage] = marks
        return stages

    @cached_property
    def by_attack(self) -> dict[tuple[str, str], Marks]:
        """Finished images (n,) that stay correct in all stages, by (attack, gradient)."""
        return {key: _all(list(stages.values())) for key, stages in self.stages.items()}

    @cached_property
    def by_gradient(self) -> dict[str, Marks]:
        """Finished images (n,) that stay correct under every attack by a gradient."""
        marks = {
            gradient: [m for (_, other), m in self.by_attack.items() if other == gradient]
            for gradient in GRADIENTS
        }
        return {gradient: _all(rows) for gradient, rows in marks.items() if rows}

    @cached_property
    def worst(self) -> Marks:
        """Finished images (n,) that are correct without an attack and under every attack."""
        return _all(list(self._correct.values()))

    @property
    def masking(self) -> float | None:
        """Accuracy under the released gradient minus the lowest under another; None without both.

        It is the part of the former figure that is no robustness.
        """
        accuracies = {gradient: float(m.mean()) for gradient, m in self.by_gradient.items()}
        released = accuracies.pop("released", None)
        return None if released is None or not accuracies else released - min(accuracies.values())

    @property
    def purifier(self) -> Purifier:
        return from_dict(self.settings["purification"])

    @property
    def prior_sha256(self) -> str | None:
        """Hash of the diffusion prior's weights; None without a prior."""
        return (self.settings["purification"] or {}).get("prior_sha256")

    @property
    def prior_gradient(self) -> str | None:
        """Gradient that a step of CLIPure-Diff follows, exact or forward; None without a prior."""
        return (self.settings["purification"] or {}).get("gradient")

    @property
    def model(self) -> str:
        """Name of the model as the command gave it, with the source of its weights."""
        names = (self.settings[name] for name in ("subject", "pretrained", "visual"))
        checkpoint = self.settings["checkpoint"]
        return " ".join(filter(None, names)) + (f" ({checkpoint})" if checkpoint else "")

    @property
    def purification(self) -> str:
        """Name of the purification and its parameters, or none."""
        return str(self.purifier or "none") + self._forward

    @property
    def _forward(self) -> str:
        return ", forward gradient" if self.prior_gradient == "forward" else ""

    @property
    def method(self) -> str:
        """Name of the purification without its number and size of steps; empty without one."""
        purifier = self.purifier
        if isinstance(purifier, DiffPurifier):
            times = "timesteps {} to {}".format(*purifier.timesteps)
            return f"CLIPure-Diff, {times}, seed {purifier.seed}{self._forward}"
        return "CLIPure-Cos" if purifier else ""

    @property
    def purification_steps(self) -> tuple[int, float]:
        """Number and size of the purification's steps; zeros without a purification."""
        return (self.purifier.steps, self.purifier.step_size) if self.purifier else (0, 0.0)

    @property
    def name(self) -> str:
        """Name of the model and of its purification, if it has one."""
        return f"{self.model}, {self.purification}" if self.purifier else self.model

    @property
    def radius(self) -> str:
        """Norm and eps of the attacks: linf eps 8/255."""
        norm, eps = self.settings["norm"], self.settings["eps"]
        return f"{norm} eps {eps * 255:g}/255" if norm == "linf" else f"{norm} eps {eps:g}"

    @property
    def title(self) -> str:
        """Data set, norm, eps and seed, which the rows of one table share."""
        return f"{self.settings['data']}, {self.radius}, seed {self.settings['seed']}"

    @property
    def budget(self) -> str:
        """Attacks, and their steps, queries, EOT draws and restarts."""
        settings, attacks = self.settings, dict.fromkeys(attack for attack, _ in self.stages)
        limits = [", ".join(attacks), f"{settings['steps']} steps"]
        if {"autoattack", "square"} & attacks.keys():
            limits.append(f"{settings['queries']} queries")
        if settings["eot"] > 1:
            limits.append(f"EOT {settings['eot']}")
        return "; ".join([*limits, f"restarts {settings['restarts']}"])

    @property
    def failed_checks(self) -> list[int]:
        """Numbers of the failed checks, from 1."""
        return [i for i, check in enumerate(self.checks, 1) if check["passed"] is False]

    @property
    def passed_checks(self) -> bool:
        """Return whether all checks were run and none failed."""
        return len(self.checks) >= CHECK_COUNT and not self.failed_checks

    def first(self, count: int) -> Result:
        """Return the result on the first images of the draw. Raises SettingsError for unfinished ones.

        The time is shared out evenly over the images.
        """
        finished = int((self.finished < count).sum())
        if finished < count:
            raise SettingsError(f"of its first {count} images only {finished} are finished")
        share = count / len(self.finished)
        return replace(
            self,
            settings=self.settings | {"samples": count},
            marks={key: row[:count] for key, row in self.marks.items()},
            seconds={key: share * value for key, value in self.seconds.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of the result file; without finished images it has no accuracies."""
        return {
            "settings": self.settings,
            "finished": len(self.finished),
            **(self._accuracies() if len(self.finished) else {}),
            "checks": self.checks,
            "agreement": self.agreement,
            "devices": list(self.devices),
            "seconds": {key: round(value, 1) for key, value in self.seconds.items()},
            "samples": self.marks,
        }

    def _accuracies(self) -> dict[str, Any]:
        rows = []
        for (attack, gradient), stages in self.stages.items():
            row: dict[str, Any] = {"attack": attack, "gradient": gradient}
            row |= {name: self.settings[name] for name in ("norm", "eps")}
            row["robust_accuracy"] = float(self.by_attack[attack, gradient].mean())
            if "" not in stages:
                row["stages"] = {stage: float(marks.mean()) for stage, marks in stages.items()}
            rows.append(row)
        return {
            "clean_accuracy": float(self.clean.mean()),
            "results": rows,
            "worst_case_accuracy": float(self.worst.mean()),
            "masking": self.masking,
        }


def _all(marks: Sequence[Marks]) -> Marks:
    every: Marks = np.logical_and.reduce(marks)
    return every


def read(path: Path) -> Result:
    """Read a result file. Raises SettingsError for any other file."""
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as err:
        reason = f"no {err}" if isinstance(err, KeyError) else str(err)
        raise SettingsError(f"{path} is no result of python -m train.evaluate: {reason}") from err


def _parse(contents: Mapping[str, Any]) -> Result:
    settings, marks = contents["settings"], contents["samples"]
    missing = [name for name in REQUIRED_SETTINGS if name not in settings]
    if missing:
        raise ValueError(f"no {', '.join(missing)} among its settings")
    if any(
        len(row) != settings["samples"] or set(row) - {CORRECT, WRONG, WAITING}
        for row in (marks[CLEAN], *marks.values())
    ):
        raise ValueError("its marks are not one of 1, 0 and ? for each image")
    attacks = {parse_key(key)[0] for key in marks if key != CLEAN}
    if not set(settings["attack"]) <= attacks:
        raise ValueError("an attack of its settings has no marks")
    checks = contents["checks"]
    if any(
        check["passed"] not in (True, False, None) or {"name", "figure"} - check.keys()
        for check in checks
    ):
        raise ValueError("a check has no name, figure or result")
    result = Result(
        settings,
        marks,
        contents["seconds"],
        checks,
        contents["agreement"],
        tuple(contents["devices"]),
    )
    str(result.purifier)  # raises ValueError, TypeError or KeyError
    return result
