"""Recorder of a measurement: marks of each image and stage, resumed from and written to result files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgeclip import storage
from edgeclip.json_output import to_json
from train.errors import SettingsError
from train.robustness import result_file
from train.robustness.result_file import CLEAN, CORRECT, WAITING, WRONG, Check, Result
from train.robustness.threat import Stage
from train.run.processes import all_max, all_sum

CODES = WAITING + WRONG + CORRECT  # in processes that share marks, the highest code wins


@dataclass
class Recorder:
    """One process's record of a measurement; the attributes are those of Result, and may change."""

    settings: dict[str, Any]
    stages: list[Stage]
    devices: list[str]
    marks: dict[str, list[str]] = field(default_factory=dict, init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    checks: list[Check] = field(default_factory=list, init=False)
    agreement: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for key in (CLEAN, *(stage.key for stage in self.stages)):
            self.marks[key] = [WAITING] * self.settings["samples"]
            self.seconds[key] = 0.0

    def is_waiting(self, key: str, places: Sequence[int]) -> bool:
        """Return whether the images at `places` have unfinished marks of a stage."""
        return any(self.marks[key][i] == WAITING for i in places)

    def correct(self, key: str, places: Sequence[int]) -> list[int]:
        """Return the places of the images that are correct after a stage."""
        return [i for i in places if self.marks[key][i] == CORRECT]

    def put(self, key: str, places: Sequence[int], correct: Sequence[int], seconds: float) -> None:
        """Mark the images at `places`: those also in `correct` as correct, all others as wrong."""
        for i in places:
            self.marks[key][i] = WRONG
        for i in correct:
            self.marks[key][i] = CORRECT
        self.seconds[key] += seconds

    def result(self) -> Result:
        """Return the measurement as it is now."""
        return Result(
            self.settings,
            {key: "".join(marks) for key, marks in self.marks.items()},
            self.seconds,
            self.checks,
            self.agreement,
            tuple(self.devices),
        )

    def write(self, path: Path) -> None:
        storage.write(path, to_json(self.result().to_dict(), indent=2) + "\n")

    def read(self, path: Path) -> None:
        """Add the contents of a result file. Raises SettingsError for one of other settings.

        The file may have fewer images: they are the first of the same draw.
        """
        try:
            before = result_file.read(path)
        except SettingsError as err:
            raise SettingsError(f"{err}: remove the file, or name another one") from err
        different = [k for k, v in self.settings.items() if before.settings.get(k) != v]
        if set(different) <= {"samples"} and before.marks.keys() != self.marks.keys():
            different.append("stages")
        grown = before.settings["samples"] < self.settings["samples"]
        if set(different) - ({"samples"} if grown else set()):
            raise SettingsError(
                f"{path} holds the results of other settings ({', '.join(different)}): name another "
                "file"
            )
        self._add(before, grown)

    def _add(self, before: Result, grown: bool) -> None:
        count = before.settings["samples"]
        if grown:  # the last batch may have been smaller, and attacks may depend on their batch
            count -= count % self.settings["batch_size"]
        for key, marks in before.marks.items():
            for i, mark in enumerate(marks[:count]):
                if mark != WAITING:
                    self.marks[key][i] = mark
        for key, value in before.seconds.items():
            self.seconds[key] += value
        self.checks = self.checks if grown else before.checks
        self.agreement = before.agreement
        self.devices = list(dict.fromkeys([*before.devices, *self.devices]))

    def gather(self) -> None:
        """Share the marks of all processes with each of them, and the sum of their time."""
        keys = list(self.marks)
        codes = [[CODES.index(mark) for mark in self.marks[key]] for key in keys]
        shared = all_max(torch.tensor(codes))
        for key, row in zip(keys, shared.tolist(), strict=True):
            self.marks[key] = [CODES[code] for code in row]
        seconds = all_sum(torch.tensor([self.seconds[key] for key in keys]).double())
        self.seconds = dict(zip(keys, seconds.tolist(), strict=True))
