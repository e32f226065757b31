"""Tables of accuracy under attack, in Markdown, from the files of python -m train.evaluate alone.

    python -m train.report docs/results/*.json --into docs/training.md

One table for each kind of measurement (data, images, norm, eps, steps, restarts, seed), one row for
each model. --into replaces what stands between the two lines MARKS of a document.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.evaluate import report
from train.runs import write_atomically
from train.settings import Parser, SettingsError, run

MARKS = ("<!-- train.report -->", "<!-- /train.report -->")
KIND = ("data", "samples", "norm", "eps", "steps", "restarts", "seed")
EPILOG = """examples:
  python -m train.report docs/results/*.json
  python -m train.report docs/results/*.json --samples 250 --into docs/training.md
"""


def read(path: Path) -> dict[str, Any]:
    """A finished result file. Raises SettingsError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "worst_case_accuracy" in found:
            return found
    except (OSError, ValueError, TypeError) as err:
        raise SettingsError(f"{path} is no result of python -m train.evaluate: {err}") from err
    raise SettingsError(f"{path} is not finished: run its python -m train.evaluate again")


def first(found: dict[str, Any], count: int) -> dict[str, Any]:
    """The result as it is on the first `count` images of its draw. Raises SettingsError."""
    if found["settings"]["samples"] < count:
        subject = found["settings"]["subject"]
        raise SettingsError(f"{subject} was measured on {found['settings']['samples']} images only")
    marks = {name: marks[:count] for name, marks in found["samples"].items()}
    return report(found["settings"] | {"samples": count}, marks)


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Markdown for the results, in the order given."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for found in results:
        kinds.setdefault(tuple(found["settings"][name] for name in KIND), []).append(found)
    return "\n\n".join(_table(dict(zip(KIND, kind, strict=True)), kinds[kind]) for kind in kinds)


def _table(kind: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["attack"] for found in results for row in found["results"]))
    what = (
        f"{kind['data']}, {kind['samples']} test images, {kind['norm']} eps "
        f"{kind['eps'] * 255:g}/255, {kind['steps']} steps, restarts {kind['restarts']}, "
        f"seed {kind['seed']}; white box, accuracy in %:"
    )
    lines = [
        what,
        "",
        _row(["model", "clean", *names, "worst case"]),
        "|---" * (len(names) + 3) + "|",
    ]
    for found in results:
        robust = {row["attack"]: row["robust_accuracy"] for row in found["results"]}
        figures = [found["clean_accuracy"], *map(robust.get, names), found["worst_case_accuracy"]]
        shown = ["" if figure is None else f"{100 * figure:.1f}" for figure in figures]
        lines.append(_row([found["settings"]["subject"], *shown]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def insert(text: str, document: Path) -> None:
    """Replace what the document has between its marks. Raises SettingsError without them."""
    try:
        old = document.read_text(encoding="utf-8")
        before, rest = old.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
    except (OSError, ValueError, IndexError) as err:
        raise SettingsError(f"{document} needs one line {MARKS[0]} and one {MARKS[1]}") from err
    new = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
    write_atomically(document, lambda part: part.write_text(new, encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    description = __doc__.split("\n\n")[0]
    parser = Parser("python -m train.report", "JSON ...", description, EPILOG)
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="result files")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="of each draw the first N images alone"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="a document with the two marks")
    args = parser.parse_args(arguments)
    results = [read(path) for path in args.results]
    if args.samples is not None:
        results = [first(found, args.samples) for found in results]
    text = tables(results)
    if args.into is None:
        print(text)
    else:
        insert(text, args.into)


if __name__ == "__main__":
    run(main)
