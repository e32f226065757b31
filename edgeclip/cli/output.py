"""Output of commands: tables for people; JSON, JSON lines and CSV for programs."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from edgeclip.errors import ImageError
from edgeclip.json_output import as_utf8, show_json


@dataclass(frozen=True)
class Answer:
    """Result of one input: predictions, an embedding or an error."""

    name: str
    result: Any  # list[Prediction], an embedding (D,), or an ImageError

    def record(self) -> dict[str, Any]:
        """Return the answer for an image as a JSON object."""
        if isinstance(self.result, ImageError):
            return {"image": self.name, "error": str(self.result)}
        return {"image": self.name, "predictions": [asdict(p) for p in self.result]}


def write_table(answers: Iterable[Answer], out: TextIO) -> None:
    """Write each image and its labels with their scores in percent."""
    for answer in answers:
        if isinstance(answer.result, ImageError):
            continue  # its error is on stderr
        print(answer.name, file=out)
        for p in answer.result:
            print(f"  {p.score:7.2%}  {p.label}", file=out)
        out.flush()


def write_json(answers: Iterable[Answer], out: TextIO) -> None:
    """Write all answers as one JSON list."""
    show_json([answer.record() for answer in answers], indent=2, out=out)


def write_jsonl(answers: Iterable[Answer], out: TextIO) -> None:
    """Write one JSON object per image and line."""
    for answer in answers:
        show_json(answer.record(), out=out)


def write_csv(answers: Iterable[Answer], out: TextIO) -> None:
    """Write one row per image and rank; a failed image has one row with its error."""
    writer = csv.writer(as_utf8(out), lineterminator="\n")
    writer.writerow(["image", "rank", "label", "score", "index", "error"])
    for answer in answers:
        if isinstance(answer.result, ImageError):
            writer.writerow([answer.name, "", "", "", "", answer.result])
            continue
        for rank, p in enumerate(answer.result, 1):
            writer.writerow([answer.name, rank, p.label, p.score, p.index, ""])
        out.flush()


WRITERS: dict[str, Callable[[Iterable[Answer], TextIO], None]] = {
    "table": write_table,
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
}


def show_trials() -> None:
    """Log trials of precisions, which take seconds, if stderr is a terminal."""
    if sys.stderr.isatty():
        logger = logging.getLogger("edgeclip.backends.trials")
        logger.setLevel(logging.INFO)
        logger.addHandler(logging.StreamHandler())


def report_format(form: str | None) -> str:
    """Return the requested format; by default table on a terminal, else json."""
    return form or ("table" if sys.stdout.isatty() else "json")


def show_report(report: dict[str, Any], form: str | None, out: TextIO | None = None) -> None:
    """Print a report, whose entries are values or lists of lines, by default on stdout.

    form: table, json, or None for the default of `report_format`. A table prints the underscores
    of keys as spaces.
    """
    if report_format(form) == "json":
        show_json(report, indent=2, out=out)
        return
    width = max(map(len, report))
    for key, value in report.items():
        lines = value if isinstance(value, list) else [value]
        for i, line in enumerate(lines or [""]):
            if isinstance(line, dict):
                line = ", ".join(f"{label(name)} {entry}" for name, entry in line.items())
            print(
                f"{label(key) if i == 0 else '':{width}}  {line if line != '' else 'none'}",
                file=out,
            )


def label(key: str) -> str:
    """Return the label of a key in a table."""
    return key.replace("_", " ")
