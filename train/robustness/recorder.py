"""The result file of a measurement: a mark for each image and stage, and the figures they give.

Marks are 1 (right), 0 (wrong) and ? (not there yet). Figures are over the images that are finished,
and so a measurement that was stopped can be read, and goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeclip import storage
from edgeclip.json_output import to_json
from train.errors import SettingsError
from train.robustness.threat import AUTOATTACK, Stage
from train.run.processes import all_max, all_sum

WAITING = "?"
CODES = WAITING + "01"


@dataclass
class Results:
    """What one process knows of a measurement."""

    settings: dict[str, Any]
    stages: list[Stage]
    marks: dict[str, list[str]] = field(default_factory=dict)  # "clean" and the stages' keys
    seconds: dict[str, float] = field(default_factory=dict)  # by key
    checks: list[dict[str, Any]] = field(default_factory=list)
    agreement: float | None = None  # largest difference in probability from a bundle's runtime
    devices: list[str] = field(default_factory=list)  # by name, on which it was measured

    def __post_init__(self) -> None:
        count = self.settings["samples"]
        for key in ("clean", *(stage.key for stage in self.stages)):
            marks = self.marks.setdefault(key, [])
            marks += WAITING * (count - len(marks))
            self.seconds.setdefault(key, 0.0)

    def waits(self, key: str, places: Sequence[int]) -> bool:
        return any(self.marks[key][i] == WAITING for i in places)

    def right(self, key: str, places: Sequence[int]) -> list[int]:
        return [i for i in places if self.marks[key][i] == "1"]

    def put(self, key: str, places: Sequence[int], right: Sequence[int], seconds: float) -> None:
        """Of the images at `places` those at `right` are right, all others wrong."""
        for i in places:
            self.marks[key][i] = "0"
        for i in right:
            self.marks[key][i] = "1"
        self.seconds[key] += seconds

    def finished(self) -> list[int]:
        """The images of which every mark is there."""
        rows = zip(*self.marks.values(), strict=True)
        return [i for i, row in enumerate(rows) if WAITING not in row]

    def figures(self) -> dict[str, Any]:
        """The result file's contents."""
        found: dict[str, Any] = {"settings": self.settings}
        places = self.finished()
        found["finished"] = len(places)
        if places:
            found |= self._accuracies(places)
        return found | {
            "checks": self.checks,
            "agreement": self.agreement,
            "devices": self.devices,
            "seconds": {key: round(value, 1) for key, value in self.seconds.items()},
            "samples": {key: "".join(marks) for key, marks in self.marks.items()},
        }

    def _accuracies(self, places: Sequence[int]) -> dict[str, Any]:
        def share(keys: Sequence[str]) -> float:
            right = sum(all(self.marks[key][i] == "1" for key in keys) for i in places)
            return right / len(places)

        def worst(gradients: Sequence[str]) -> float:
            return share([stage.key for stage in self.stages if stage.gradient in gradients])

        settings = self.settings
        results = []
        for gradient in settings["gradient"]:
            for attack in settings["attack"]:
                keys = self._keys(attack, gradient)
                row = {"attack": attack, "gradient": gradient}
                row |= {"norm": settings["norm"], "eps": settings["eps"]}
                if not keys:
                    continue
                row["robust_accuracy"] = share(keys)
                if attack == "autoattack":
                    names = [key.split()[1].split("/")[0] for key in keys]
                    row["stages"] = {
                        name: share([key]) for name, key in zip(names, keys, strict=True)
                    }
                results.append(row)
        seen = dict.fromkeys(stage.gradient for stage in self.stages)
        others = [gradient for gradient in seen if gradient != "released"]
        masked = "released" in seen and others
        return {
            "clean_accuracy": share(["clean"]),
            "results": results,
            "worst_case_accuracy": worst(settings["gradient"]),
            # Positive: how much of the figure under the released gradient is no robustness at all.
            "masking": worst(["released"]) - min(worst([g]) for g in others) if masked else None,
        }

    def _keys(self, attack: str, gradient: str) -> list[str]:
        names = [f"{attack} {name}" for name in AUTOATTACK] if attack == "autoattack" else [attack]
        wanted = {f"{name}/{gradient}" for name in names}
        return [stage.key for stage in self.stages if stage.key in wanted]

    def write(self, path: Path) -> None:
        storage.write(path, to_json(self.figures(), indent=2) + "\n")

    def read(self, path: Path) -> None:
        """Add what the file holds. Raises SettingsError for one of other settings.

        A smaller number of images is no other setting: they are the first of the same draw.
        """
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            settings = before["settings"]
            different = [k for k in self.settings if settings.get(k) != self.settings[k]]
            grown = settings["samples"] < self.settings["samples"]
            if not set(different) - ({"samples"} if grown else set()):
                self._take(before, grown)
                return
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            raise SettingsError(f"{path} is not a result file: remove it, or name another") from err
        raise SettingsError(
            f"{path} holds the results of other settings ({', '.join(different)}): name another file"
        )

    def _take(self, before: dict[str, Any], grown: bool) -> None:
        # What was the last batch may be a part of one now, and attacked beside other images.
        size = self.settings["batch_size"]
        whole = before["settings"]["samples"]
        count = whole // size * size if grown else whole
        for key, marks in before["samples"].items():
            for i, mark in enumerate(marks[:count]):
                if mark != WAITING:
                    self.marks[key][i] = mark
        for key, value in before["seconds"].items():
            self.seconds[key] += value
        self.checks = self.checks if grown else before["checks"]
        self.agreement = before["agreement"]
        self.devices = list(dict.fromkeys([*before.get("devices", ()), *self.devices]))

    def gather(self) -> None:
        """Make every process know what any of them found, and the time that they took together."""
        keys = list(self.marks)
        codes = [[CODES.index(mark) for mark in self.marks[key]] for key in keys]
        together = all_max(torch.tensor(codes))
        for key, row in zip(keys, together.tolist(), strict=True):
            self.marks[key] = [CODES[code] for code in row]
        spent = all_sum(torch.tensor([self.seconds[key] for key in keys]).double())
        self.seconds = dict(zip(keys, spent.tolist(), strict=True))
