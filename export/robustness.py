"""Measurements under attack for a bundle's manifest, from the files of python -m train.evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeclip.manifest import Robustness
from edgeclip.purify import CosPurifier, Purifier
from export import ExportError
from export.checkpoints import Source

COMPARABLE = ("data", "samples", "norm", "eps", "attack", "steps", "restarts", "seed")
Z = 1.96  # of a 95 % interval


def read(
    paths: Sequence[Path], source: Source, templates: Sequence[str]
) -> tuple[tuple[Robustness, ...], Purifier]:
    """What was measured, one entry for each file, and the purification that it recommends.

    Raises ExportError for a file that is not finished, that was not checked or failed a check, or
    that is not of these weights and templates: a bundle carries no figure of another model, and
    none that is not to be believed.
    """
    found = [_load(path, source, templates) for path in paths]
    rows = [_row(path, result) for path, result in zip(paths, found, strict=True)]
    return tuple(rows), _recommended(found)


def _load(path: Path, source: Source, templates: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["settings"]
        if settings["weights_sha256"] != source.weights_sha256:
            raise ExportError(
                f"{path} was measured on other weights than those of {source.name}: measure these"
            )
        if settings["templates"] != list(templates):
            raise ExportError(
                f"{path} was measured with other templates than the bundle's, "
                f"{settings['templates']}: measure with these"
            )
        if found["finished"] < settings["samples"]:
            raise ExportError(f"{path} is not finished: run its python -m train.evaluate again")
        failed = [row["name"] for row in found["checks"] if row["passed"] is False]
        if failed or not found["checks"]:
            raise ExportError(
                f"{path} {'failed ' + ', '.join(failed) if failed else 'was not checked'}: a bundle "
                "carries only figures that passed every check"
            )
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err
    return found


def _row(path: Path, found: dict[str, Any]) -> Robustness:
    settings = found["settings"]
    purifier = _purifier(found)
    try:
        return Robustness(
            attacks=tuple(settings["attack"]),
            clean_accuracy=found["clean_accuracy"],
            worst_case_accuracy=found["worst_case_accuracy"],
            purification=f"cos {purifier.steps} x {purifier.step_size:g}" if purifier else "none",
            **{
                name: settings[name]
                for name in ("data", "samples", "norm", "eps", "steps", "restarts", "seed")
            },
        )
    except (ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err


def _purifier(found: dict[str, Any]) -> Purifier:
    given = found["settings"]["purification"]
    return CosPurifier(given["steps"], given["step_size"]) if given else None


def _recommended(results: Sequence[dict[str, Any]]) -> Purifier:
    """The purification whose worst case is furthest above the one without, if any is.

    Above: on the same images under the same attacks, by more than the 95 % interval of the paired
    difference, so that no bundle recommends what chance has favoured.
    """
    best, largest = None, 0.0
    for found in results:
        for plain in results:
            same = all(found["settings"][k] == plain["settings"][k] for k in COMPARABLE)
            if _purifier(found) is None or _purifier(plain) is not None or not same:
                continue
            change = _worst(found).astype(int) - _worst(plain)
            surely = change.mean() - Z * change.std() / len(change) ** 0.5
            if surely > largest:
                best, largest = _purifier(found), surely
    return best


def _worst(found: dict[str, Any]) -> np.ndarray:
    """(N,) booleans: right under everything that was tried."""
    table = np.array([list(marks) for marks in found["samples"].values()])
    return (table == "1").all(0)
