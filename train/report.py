"""Tables of accuracy under attack, in Markdown, from result files of python -m train.evaluate.

    python -m train.report docs/results/*.json --checks --into docs/ROBUSTNESS.md

There is one table for each data set, norm, eps and seed. Figures are over the images that all attacks
have finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip import storage
from train import documents
from train.errors import SettingsError
from train.robustness import plots
from train.robustness.result_file import (
    CHECK_COUNT,
    CLEAN,
    GRADIENTS,
    MIN_IMAGES,
    Check,
    Marks,
    Result,
    parse_key,
    read,
)
from train.run.settings import Parser, check_number, run

BLOCK = "train.report"  # name of the block in a document
CASCADE = ("autoattack", "exact")
CONFIDENCE, Z = 0.95, 1.96  # Z: normal quantile of this two-sided confidence
PASSED = {True: "yes", False: "**NO**", None: "n/a"}
INTERVAL = "± is half the width of the 95 % Wilson interval of the worst case."
WARNING = "**! !** stands around a worst case that has not passed all checks: do not rely on it."
EPILOG = """examples:
  python -m train.report docs/results/*.json
  python -m train.report docs/results/*.json --checks --into docs/ROBUSTNESS.md --plots docs/plots
  python -m train.report docs/results/*.json --samples 250 --brief --into docs/training.md
"""


def tables(results: Sequence[Result], *, brief: bool = False, checks: bool = False) -> str:
    """Return the results in Markdown: smaller eps first, and models without purification first."""
    blocks = []
    ordered = sorted(results, key=_order)
    for rows in _grouped(ordered, lambda row: row.title):
        blocks.append(_table(rows, brief))
        if not brief:
            blocks += _details(rows)
        if checks and any(row.checks for row in rows):
            blocks.append(_all_checks(rows))
    return "\n\n".join(blocks)


def _order(row: Result) -> tuple[Any, ...]:
    return row.settings["eps"], row.model, row.method, row.purification_steps


def _grouped(rows: Sequence[Result], key: Callable[..., Any]) -> list[list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _table(rows: Sequence[Result], brief: bool) -> str:
    """Return accuracy by gradient, with the checks; if brief, by attack under the exact gradient."""
    if brief:
        names = dict.fromkeys(
            a for row in rows for a, gradient in row.stages if gradient == "exact"
        )
        figures = {name: [row.by_attack.get((name, "exact")) for row in rows] for name in names}
    else:
        names = dict.fromkeys(g for g in GRADIENTS if any(g in row.by_gradient for row in rows))
        figures = {name: [row.by_gradient.get(name) for row in rows] for name in names}
    columns = {
        **_names(rows),
        "n": [_count(row) for row in rows],
        "clean": [_percent(row.clean) for row in rows],
        **{name: [_percent(marks) for marks in column] for name, column in figures.items()},
        "worst case": [_worst(row) for row in rows],
        "masking": ["" if row.masking is None else _points(row.masking) for row in rows],
        "attacks": [row.budget for row in rows],
        "checks": [_verdict(row) if row.passed_checks else f"**{_verdict(row)}**" for row in rows],
    }
    untrusted = [row for row in rows if not row.passed_checks]
    heading, notes = [rows[0].title], [INTERVAL, WARNING] if untrusted else [INTERVAL]
    if any(len(row.finished) < MIN_IMAGES for row in rows):
        notes.append(f"A **bold n** is below {MIN_IMAGES}: a first look.")
    if brief or not any(columns["masking"]):
        del columns["masking"]
    if brief:
        del columns["checks"]
        for group in _grouped(untrusted, _verdict):
            notes.append(f"{_verdict(group[0])}: {', '.join(row.name for row in group)}.")
        if not any(row.purifier for row in rows):
            del columns["purification"]
        if len(set(columns["attacks"])) == 1:
            heading.append(columns.pop("attacks")[0])
    heading.append("white box, accuracy in %:")
    return "\n\n".join(["; ".join(heading), _columns(columns), " ".join(notes)])


def _details(rows: Sequence[Result]) -> list[str]:
    """Return the failed checks, the stages of AutoAttack, and the grids of purification settings."""
    failed = [
        f"- {row.name}: check {number} {_check(row.checks[number - 1])}"
        for row in rows
        for number in row.failed_checks
    ]
    cascades = [row for row in rows if CASCADE in row.stages]
    blocks = ["\n".join(["Failed checks:", "", *failed])] if failed else []
    blocks += [_autoattack(cascades)] if cascades else []
    for group in _grouped(
        rows, lambda row: (row.model, row.settings["weights_sha256"], row.budget)
    ):
        plain = [row for row in group if row.purifier is None]
        purified = [row for row in group if row.purifier]
        for method in _grouped(purified, lambda row: (row.method, row.prior_sha256)):
            if len({row.purification_steps for row in method}) > 1:
                blocks.append(_grid(method, min(plain, key=_mean_worst, default=None)))
    return blocks


def _mean_worst(row: Result) -> float:
    return float(row.worst.mean())


def _autoattack(rows: Sequence[Result]) -> str:
    stages = [row.stages[CASCADE] for row in rows]
    names = dict.fromkeys(name for marks in stages for name in marks)
    columns = {
        **_names(rows),
        **{name: [_percent(marks.get(name)) for marks in stages] for name in names},
        "seconds per image": [_seconds_per_image(row) for row in rows],
        "on": [", ".join(row.devices) or "not recorded" for row in rows],
    }
    title = "AutoAttack, cumulative, exact gradient; accuracy in % after each stage:\n\n"
    return title + _columns(columns)


def _seconds_per_image(row: Result) -> str:
    stages = [key for key in row.seconds if key != CLEAN and parse_key(key)[:2] == CASCADE]
    seconds = sum(row.seconds[key] for key in stages)
    return f"{seconds / len(row.finished):.3g}" if seconds else ""


def _grid(rows: Sequence[Result], plain: Result | None) -> str:
    """Return clean and worst-case accuracy by steps and step size, of one model and one method."""
    cells: dict[tuple[int, float], Result] = {}
    for group in _grouped(rows, lambda row: row.purification_steps):
        worst = min(group, key=_mean_worst)
        cells[worst.purification_steps] = worst
    steps = sorted({count for count, _ in cells})
    columns = {"steps": [str(count) for count in steps]}
    for size in sorted({size for _, size in cells}):
        column = [cells.get((count, size)) for count in steps]
        columns[f"step size {size:g}"] = ["" if row is None else _pair(row) for row in column]
    title = f"{rows[0].model}, {rows[0].method}, clean / worst case in % ({rows[0].budget})"
    if plain is None:
        return f"{title}; no result without purification:\n\n{_columns(columns)}"
    title = f"{title}; without purification {_pair(plain)}:"
    return "\n\n".join([title, _columns(columns), _gain(plain, list(cells.values()))])


def _gain(plain: Result, purified: Sequence[Result]) -> str:
    """Return the gain of the best setting, on the images it shares with the unpurified model."""
    pairs = []
    for row in purified:
        _, i, j = np.intersect1d(row.finished, plain.finished, return_indices=True)
        if len(i):
            clean = row.clean[i].mean() - plain.clean[j].mean()
            pairs.append((row, row.worst[i].astype(int) - plain.worst[j], clean))
    if not pairs:
        return "No setting shares images with the unpurified model."
    row, change, clean = max(pairs, key=lambda pair: pair[1].mean())
    gain = change.mean()
    half = Z * change.std() / len(change) ** 0.5  # paired marks, as in McNemar's test
    rank = "has the largest gain" if gain > 0 else "comes closest, none gains"
    within = ", within sampling error" if abs(gain) <= half else ""
    trusted = row.passed_checks and plain.passed_checks
    warning = "" if trusted else " **! Not all checks passed !**"
    return (
        f"Of {len(purified)} settings {row.purification} {rank}: worst case {_points(gain)} points "
        f"± {100 * half:.1f} over no purification (95 % interval of the paired difference, "
        f"{len(change)} images){within}; clean accuracy {_points(clean)} points.{warning}"
    )


def _all_checks(rows: Sequence[Result]) -> str:
    checks = [(row, i, check) for row in rows for i, check in enumerate(row.checks, 1)]
    columns = {
        **_names([row for row, _, _ in checks]),
        "check": [str(number) for _, number, _ in checks],
        "passed": [PASSED[check["passed"]] for _, _, check in checks],
        "what was found": [_check(check) for _, _, check in checks],
    }
    return f"<details><summary>All checks</summary>\n\n{_columns(columns)}\n\n</details>"


def _check(check: Check) -> str:
    return " ".join(f"{check['name']}: {check['figure']}".split())


def _names(rows: Sequence[Result]) -> dict[str, list[str]]:
    return {"model": [r.model for r in rows], "purification": [r.purification for r in rows]}


def _count(row: Result) -> str:
    done, samples = len(row.finished), row.settings["samples"]
    text = str(done) if done == samples else f"{done} of {samples}"
    return text if done >= MIN_IMAGES else f"**{text}**"


def _verdict(row: Result) -> str:
    """Return the state of the checks: all passed, or those that failed or were not run."""
    if row.passed_checks:
        applied = sum(check["passed"] is not None for check in row.checks)
        other = len(row.checks) - applied
        return f"{applied}/{applied} passed" + (f", {other} n/a" if other else "")
    problems = ["FAILED: " + ", ".join(map(str, row.failed_checks))] if row.failed_checks else []
    if len(row.checks) < CHECK_COUNT:
        problems.append("UNFINISHED" if row.checks else "NOT CHECKED")
    return "; ".join(problems)


def _percent(marks: Marks | None) -> str:
    return "" if marks is None else f"{100 * marks.mean():.1f}"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # never -0.0


def _marked(text: str, row: Result) -> str:
    """Return the text, between warning signs unless all checks are passed."""
    return text if row.passed_checks else f"**! {text} !**"


def _worst(row: Result) -> str:
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(int(row.worst.sum()), len(row.worst)).proportion_ci(
        confidence_level=CONFIDENCE, method="wilson"
    )
    half = (interval.high - interval.low) / 2
    return _marked(f"{_percent(row.worst)} ± {100 * half:.1f}", row)


def _pair(row: Result) -> str:
    return f"{_percent(row.clean)} / {_marked(_percent(row.worst), row)}"


def _columns(columns: dict[str, list[str]]) -> str:
    rows = [columns.keys(), *zip(*columns.values(), strict=True)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def read_finished(path: Path, samples: int | None = None) -> Result:
    """Read a result, or the part on the first images of its draw. Raises SettingsError without any."""
    result = read(path)
    try:
        if not len(result.finished):
            raise SettingsError("no image is finished yet: continue its python -m train.evaluate")
        return result if samples is None else result.first(samples)
    except SettingsError as err:
        raise SettingsError(f"{path}: {err}") from err


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("python -m train.report", "JSON ...", __doc__.split("\n\n")[0], EPILOG)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="JSON", help="result files")
    add("--samples", type=int, metavar="N", help="only the first N images of each draw")
    detail = parser.add_mutually_exclusive_group()
    detail.add_argument(
        "--brief", action="store_true", help="only a table, with a column per attack"
    )
    detail.add_argument("--checks", action="store_true", help="all checks with their figures too")
    add(
        "--into",
        type=Path,
        metavar="FILE",
        help=f"document to update, between its lines <!-- {BLOCK} --> and <!-- /{BLOCK} -->",
    )
    add("--plots", type=Path, metavar="FOLDER", help="folder for plots, which --into links")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if args.samples is not None:
        check_number("samples", args.samples, 1)
    if args.into is not None:
        storage.check_output(args.into, args.results)
    results = [read_finished(path, args.samples) for path in args.results]
    text = tables(results, brief=args.brief, checks=args.checks)
    drawn = {} if args.plots is None else plots.draw(results, args.plots)
    if args.plots is not None:
        print(f"{args.plots}: {len(drawn)} plots", file=sys.stderr)
    if args.into is None:
        print(text)
    else:
        block = "\n\n".join([text, *plots.links(drawn, args.into)])
        documents.update(args.into, BLOCK, lambda _: block)


if __name__ == "__main__":
    run(main)
