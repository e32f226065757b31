"""Tables of accuracy under attack, in Markdown, from the files of python -m train.evaluate alone.

    python -m train.report docs/results/*.json --checks --into docs/ROBUSTNESS.md

One table for each data set, norm, eps and seed. Figures are over the images that every attack is done
with. --into replaces what a document has between MARKS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip import storage
from train.errors import SettingsError
from train.robustness import plots
from train.robustness.defence import GRADIENTS
from train.robustness.result_file import ENOUGH, PASSED, Result, _parse, read
from train.run.settings import Parser, check_number, run

MARKS = ("<!-- train.report -->", "<!-- /train.report -->")
AUTOATTACK = ("autoattack", "exact")
Z = 1.96  # of a 95 % interval
INTERVAL = "± is half the width of the 95 % Wilson interval of the worst case."
DOUBT = "**! !** stands around a worst case that has not passed all checks: do not rely on it."
EPILOG = """examples:
  python -m train.report docs/results/*.json
  python -m train.report docs/results/*.json --checks --into docs/ROBUSTNESS.md --plots docs/plots
  python -m train.report docs/results/*.json --samples 250 --brief --into docs/training.md
"""


def tables(measured: Sequence[Result], *, brief: bool = False, checks: bool = False) -> str:
    """Markdown for the results: a block for each kind, smaller eps first, no purification first."""
    blocks = []
    ordered = sorted(measured, key=_order)
    for rows in _grouped(ordered, lambda row: row.title):
        blocks.append(_table(rows, brief))
        if not brief:
            blocks += _details(rows)
        if checks and any(row.checks for row in rows):
            blocks.append(_all_checks(rows))
    return "\n\n".join(blocks)


def _order(row: Result) -> tuple[Any, ...]:
    return row.settings["eps"], row.model, row.method, row.setting


def _grouped(rows: Sequence[Result], key: Callable[..., Any]) -> list[list[Result]]:
    groups: dict[Any, list[Result]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _table(rows: Sequence[Result], brief: bool) -> str:
    """By gradient with the state of the checks; brief: by attack, under the exact gradient."""
    if brief:
        names = dict.fromkeys(a for row in rows for a, mode in row.stages if mode == "exact")
        figures = {name: [row.attacks.get((name, "exact")) for row in rows] for name in names}
    else:
        modes = [mode for mode in GRADIENTS if any(mode in row.modes for row in rows)]
        figures = {mode: [row.modes.get(mode) for row in rows] for mode in modes}
    columns = {
        **_names(rows),
        "n": [row.count for row in rows],
        "clean": [_percent(row.clean) for row in rows],
        **{name: [_percent(marks) for marks in column] for name, column in figures.items()},
        "worst case": [_worst(row) for row in rows],
        "masking": ["" if row.masking is None else _points(row.masking) for row in rows],
        "attacks": [row.budget for row in rows],
        "checks": [row.verdict if row.believed else f"**{row.verdict}**" for row in rows],
    }
    doubted = [row for row in rows if not row.believed]
    told, notes = [rows[0].title], [INTERVAL, DOUBT] if doubted else [INTERVAL]
    if any(len(row.images) < ENOUGH for row in rows):
        notes.append(f"A **bold n** is below {ENOUGH}: a first look.")
    if brief or not any(columns["masking"]):
        del columns["masking"]
    if brief:
        del columns["checks"]
        for group in _grouped(doubted, lambda row: row.verdict):
            notes.append(f"{group[0].verdict}: {', '.join(row.name for row in group)}.")
        if not any(row.purifier for row in rows):
            del columns["purification"]
        if len(set(columns["attacks"])) == 1:
            told.append(columns.pop("attacks")[0])
    told.append("white box, accuracy in %:")
    return "\n\n".join(["; ".join(told), _columns(columns), " ".join(notes)])


def _details(rows: Sequence[Result]) -> list[str]:
    """What stands below a table: failed checks, the stages of AutoAttack, the grids."""
    failed = [
        f"- {row.name}: check {number} {_check(row.checks[number - 1])}"
        for row in rows
        for number in row.failed
    ]
    cascades = [row for row in rows if AUTOATTACK in row.stages]
    blocks = ["\n".join(["Failed checks:", "", *failed])] if failed else []
    blocks += [_autoattack(cascades)] if cascades else []
    same = _grouped(rows, lambda row: (row.model, row.settings.get("weights_sha256"), row.budget))
    for group in same:
        for own in _grouped([row for row in group if row.purifier], _kind):
            if len({row.setting for row in own}) > 1:
                plain = [row for row in group if row.purifier is None]
                blocks.append(_grid(own, min(plain, key=_mean_worst, default=None)))
    return blocks


def _kind(row: Result) -> tuple[str, str | None]:
    return row.method, row.prior


def _mean_worst(row: Result) -> float:
    return float(row.worst.mean())


def _autoattack(rows: Sequence[Result]) -> str:
    stages = [row.stages[AUTOATTACK] for row in rows]
    names = dict.fromkeys(name for marks in stages for name in marks)
    costs = [sum(s for k, s in r.seconds.items() if _parse(k)[::2] == AUTOATTACK) for r in rows]
    columns = {
        **_names(rows),
        **{name: [_percent(marks.get(name)) for marks in stages] for name in names},
        "seconds per image": [f"{cost:.3g}" if cost else "" for cost in costs],
        "on": [", ".join(row.devices) or "not recorded" for row in rows],
    }
    title = "AutoAttack, cumulative, exact gradient; accuracy in % after each stage:\n\n"
    return title + _columns(columns)


def _grid(rows: Sequence[Result], plain: Result | None) -> str:
    """Clean and worst-case accuracy by steps and step size, for one model under the same attacks."""
    settings = _grouped(rows, lambda row: row.setting)
    # Of several results of a setting the worst counts.
    cells = {same[0].setting: min(same, key=_mean_worst) for same in settings}
    steps, sizes = (sorted({setting[i] for setting in cells}) for i in range(2))
    columns = {"steps": [str(count) for count in steps]}
    for size in sizes:
        found = [cells.get((count, size)) for count in steps]
        columns[f"step size {size:g}"] = ["" if row is None else _pair(row) for row in found]
    title = f"{rows[0].model}, {rows[0].method}, clean / worst case in % ({rows[0].budget})"
    if plain is None:
        return f"{title}; no result without purification:\n\n{_columns(columns)}"
    title = f"{title}; without purification {_pair(plain)}:"
    return "\n\n".join([title, _columns(columns), _gain(plain, list(cells.values()))])


def _gain(plain: Result, purified: Sequence[Result]) -> str:
    """What the best setting gains, on the images that it shares with the plain model."""
    pairs = []
    for row in purified:
        _, i, j = np.intersect1d(row.images, plain.images, return_indices=True)
        if len(i):
            clean = row.clean[i].mean() - plain.clean[j].mean()
            pairs.append((row, row.worst[i].astype(int) - plain.worst[j], clean))
    if not pairs:
        return "No setting shares images with the unpurified model."
    row, change, clean = max(pairs, key=lambda pair: pair[1].mean())
    gain = change.mean()
    half = Z * change.std() / len(change) ** 0.5  # of paired marks, as in McNemar's test
    what = "has the largest gain" if gain > 0 else "comes closest, none gains"
    within = ", within sampling error" if abs(gain) <= half else ""
    doubt = "" if row.believed and plain.believed else " **! Not all checks passed !**"
    return (
        f"Of {len(purified)} settings {row.purification} {what}: worst case {_points(gain)} points "
        f"± {100 * half:.1f} over no purification (95 % interval of the paired difference, "
        f"{len(change)} images){within}; clean accuracy {_points(clean)} points.{doubt}"
    )


def _all_checks(rows: Sequence[Result]) -> str:
    found = [(row, i, check) for row in rows for i, check in enumerate(row.checks, 1)]
    columns = {
        **_names([row for row, _, _ in found]),
        "check": [str(number) for _, number, _ in found],
        "passed": [PASSED[check["passed"]] for _, _, check in found],
        "what was found": [_check(check) for _, _, check in found],
    }
    return f"<details><summary>All checks</summary>\n\n{_columns(columns)}\n\n</details>"


def _check(check: dict[str, Any]) -> str:
    return " ".join(f"{check['name']}: {check['figure']}".split())


def _names(rows: Sequence[Result]) -> dict[str, list[str]]:
    return {"model": [r.model for r in rows], "purification": [r.purification for r in rows]}


def _percent(marks: np.ndarray | None) -> str:
    return "" if marks is None else f"{100 * marks.mean():.1f}"


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}"  # never -0.0


def _doubted(text: str, row: Result) -> str:
    return text if row.believed else f"**! {text} !**"


def _worst(row: Result) -> str:
    n, p = len(row.worst), row.worst.mean()
    half = Z / (1 + Z**2 / n) * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5  # Wilson, 1927
    return _doubted(f"{_percent(row.worst)} ± {100 * half:.1f}", row)


def _pair(row: Result) -> str:
    return f"{_percent(row.clean)} / {_doubted(_percent(row.worst), row)}"


def _columns(columns: dict[str, list[str]]) -> str:
    rows = [columns.keys(), *zip(*columns.values(), strict=True)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def insert(text: str, document: Path) -> None:
    """Replace what the document has between its marks. Raises SettingsError without them."""
    try:
        old = document.read_text(encoding="utf-8")
        before, rest = old.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
    except (OSError, ValueError, IndexError) as err:
        raise SettingsError(f"{document} needs one line {MARKS[0]} and one {MARKS[1]}") from err
    new = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
    storage.write(document, new)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("python -m train.report", "JSON ...", __doc__.split("\n\n")[0], EPILOG)
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="JSON", help="result files")
    add("--samples", type=int, metavar="N", help="of each draw the first N images alone")
    detail = parser.add_mutually_exclusive_group()
    detail.add_argument("--brief", action="store_true", help="a table alone, attack by attack")
    detail.add_argument("--checks", action="store_true", help="all checks too, with their figures")
    add("--into", type=Path, metavar="FILE", help="a document with the two marks")
    add("--plots", type=Path, metavar="FOLDER", help="draw what can be drawn; --into shows it")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if args.samples is not None:
        check_number("samples", args.samples, 1)
    if args.into is not None:
        storage.check_output(args.into, args.results)
    measured = [read(path, args.samples) for path in args.results]
    text = tables(measured, brief=args.brief, checks=args.checks)
    drawn = {} if args.plots is None else plots.draw(measured, args.plots)
    if args.plots is not None:
        print(f"{args.plots}: {len(drawn)} plots", file=sys.stderr)
    if args.into is None:
        print(text)
    else:
        insert("\n\n".join([text, *plots.links(drawn, args.into)]), args.into)


if __name__ == "__main__":
    run(main)
