"""Measurements under attack for a bundle's manifest, from the files of python -m train.evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from edgeclip.manifest import Robustness
from edgeclip.purify import DiffPurifier, Purifier, from_dict
from export import ExportError
from train.models.checkpoints import Source
from train.models.trained_prior import TrainedPrior

CHECKS = 10  # that a figure has to pass
ENOUGH = 1000  # images, before a purification is recommended
LEVEL = 0.05  # of all comparisons together, two-sided


def read(
    paths: Sequence[Path],
    source: Source,
    templates: Sequence[str],
    prior: TrainedPrior | None = None,
    prior_gradient: str = "exact",
) -> tuple[tuple[Robustness, ...], Purifier]:
    """What was measured, without purification and with the recommended one, and which that is.

    Purified rows that failed a check are left out. Raises ExportError for any other row that did,
    for a file that is not finished or not checked, and for one that is not of these weights,
    templates and prior: a bundle carries no figure of another model, and none that is not to be believed.
    """
    found = [(path, _load(path, source, templates)) for path in paths]
    for path, result in found:
        told = result["settings"]["purification"]
        own = (prior and prior.weights_sha256, prior_gradient)
        if isinstance(_purifier(result), DiffPurifier) and own != (
            told.get("prior_sha256"), told.get("gradient")
        ):  # fmt: skip
            raise ExportError(f"{path} was measured with another prior: name its own with --prior")
    passed = [(path, result) for path, result in found if _passed(path, result)]
    recommended = _recommended([result for _, result in passed])
    kept = [pair for pair in passed if _purifier(pair[1]) in (None, recommended)]
    return tuple(_row(*pair) for pair in kept), recommended


def _passed(path: Path, found: dict[str, Any]) -> bool:
    """Whether every check was passed. Raises ExportError where the row is not a purified one."""
    failed = [row["name"] for row in found["checks"] if row["passed"] is False]
    if failed and _purifier(found) is None:
        raise ExportError(
            f"{path} failed {', '.join(failed)}: a bundle carries only figures that passed every check"
        )
    return not failed


def _load(path: Path, source: Source, templates: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["settings"]
        if settings["weights_sha256"] != source.weights_sha256:
            raise ExportError(
                f"{path} was measured on other weights than those of {source.name}: measure these"
            )
        if bool(settings.get("quick_gelu", source.quick_gelu)) != source.quick_gelu:
            raise ExportError(
                f"{path} was measured with another activation: give both the same --quickgelu"
            )
        if settings["templates"] != list(templates):
            raise ExportError(
                f"{path} was measured with other templates than the bundle's, "
                f"{settings['templates']}: measure with these"
            )
        if found["finished"] < settings["samples"]:
            raise ExportError(f"{path} is not finished: run its python -m train.evaluate again")
        if len(found["checks"]) < CHECKS:
            raise ExportError(f"{path} was not checked: run its python -m train.evaluate again")
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err
    return found


def _row(path: Path, found: dict[str, Any]) -> Robustness:
    settings = found["settings"]
    try:
        return Robustness(
            attacks=tuple(settings["attack"]),
            clean_accuracy=found["clean_accuracy"],
            worst_case_accuracy=found["worst_case_accuracy"],
            purification=str(_purifier(found) or "none"),
            **{
                name: settings[name]
                for name in ("data", "samples", "norm", "eps", "steps", "restarts", "seed")
            },
        )
    except (ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err


def _purifier(found: dict[str, Any]) -> Purifier:
    return from_dict(found["settings"]["purification"])


def _recommended(results: Sequence[dict[str, Any]]) -> Purifier:
    """The purification whose worst case is furthest above the one without, if any is.

    Above: on the same images under the same attacks, by more than the interval of the paired
    difference, widened for the number of comparisons, so that no bundle recommends what chance has
    favoured.
    """
    pairs = [
        (_purifier(found), _worst(found).astype(int) - _worst(plain))
        for found in results
        for plain in results
        if _purifier(found) and not _purifier(plain) and _attacked(found) == _attacked(plain)
    ]
    best, largest = None, 0.0
    for purifier, change in pairs:
        z = NormalDist().inv_cdf(1 - LEVEL / 2 / len(pairs))
        surely = change.mean() - z * change.std() / len(change) ** 0.5
        if len(change) >= ENOUGH and surely > largest:
            best, largest = purifier, surely
    return best


def _attacked(found: dict[str, Any]) -> dict[str, Any]:
    """All settings but the purification and the gradients through it."""
    own = ("purification", "gradient")
    return {key: value for key, value in found["settings"].items() if key not in own}


def _worst(found: dict[str, Any]) -> np.ndarray:
    """(N,) booleans: right under everything that was tried."""
    table = np.array([list(marks) for marks in found["samples"].values()])
    return (table == "1").all(0)
