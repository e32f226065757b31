"""Robustness measurements for a bundle's manifest, from files of python -m train.evaluate."""

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

CHECKS = 10  # sanity checks that a figure must pass
ENOUGH = 1000  # fewest images on which a purification can be recommended
LEVEL = 0.05  # significance level of all comparisons together, two-sided


def read(
    paths: Sequence[Path],
    source: Source,
    templates: Sequence[str],
    prior: TrainedPrior | None = None,
    prior_gradient: str = "exact",
) -> tuple[tuple[Robustness, ...], Purifier]:
    """Return the measurements of a bundle's manifest, and the purification to recommend.

    The measurements are those without purification and with the recommended one. Raises ExportError
    for a file that is unfinished or unchecked, that failed a check without purification, or that
    was measured with other weights, templates or prior. A purified measurement that failed a check
    is left out.
    """
    results = [(path, _load(path, source, templates)) for path in paths]
    exported = (prior and prior.weights_sha256, prior_gradient)
    for path, result in results:
        purification = result["settings"]["purification"]
        if isinstance(_purifier(result), DiffPurifier) and exported != (
            purification.get("prior_sha256"),
            purification.get("gradient"),
        ):
            raise ExportError(f"{path} was measured with another prior: name that one with --prior")
    passed = [(path, result) for path, result in results if _passed(path, result)]
    recommended = _recommended([result for _, result in passed])
    kept = [pair for pair in passed if _purifier(pair[1]) in (None, recommended)]
    return tuple(_row(*pair) for pair in kept), recommended


def _passed(path: Path, result: dict[str, Any]) -> bool:
    """Return whether no check failed. Raises ExportError if one did without purification."""
    failed = [row["name"] for row in result["checks"] if row["passed"] is False]
    if failed and _purifier(result) is None:
        raise ExportError(
            f"{path} failed {', '.join(failed)}: a bundle carries only figures that passed every "
            "check"
        )
    return not failed


def _load(path: Path, source: Source, templates: Sequence[str]) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings = result["settings"]
        if settings["weights_sha256"] != source.weights_sha256:
            raise ExportError(
                f"{path} was measured on other weights than {source.name}: evaluate this model"
            )
        if bool(settings.get("quick_gelu", source.quick_gelu)) != source.quick_gelu:
            raise ExportError(
                f"{path} was measured with another activation: use the same --quickgelu for both"
            )
        if settings["templates"] != list(templates):
            raise ExportError(
                f"{path} was measured with other templates, {settings['templates']}: evaluate "
                "with the bundle's templates"
            )
        if result["finished"] < settings["samples"]:
            raise ExportError(f"{path} is not finished: run its python -m train.evaluate again")
        if len(result["checks"]) < CHECKS:
            raise ExportError(f"{path} was not checked: run its python -m train.evaluate again")
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err
    return result


def _row(path: Path, result: dict[str, Any]) -> Robustness:
    settings = result["settings"]
    try:
        return Robustness(
            attacks=tuple(settings["attack"]),
            clean_accuracy=result["clean_accuracy"],
            worst_case_accuracy=result["worst_case_accuracy"],
            purification=str(_purifier(result) or "none"),
            **{
                name: settings[name]
                for name in ("data", "samples", "norm", "eps", "steps", "restarts", "seed")
            },
        )
    except (ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err


def _purifier(result: dict[str, Any]) -> Purifier:
    return from_dict(result["settings"]["purification"])


def _recommended(results: Sequence[dict[str, Any]]) -> Purifier:
    """Return the purification with the largest significant gain in worst-case accuracy, if any.

    A gain is measured on the same images under the same attacks. It counts by the lower end of its
    paired confidence interval, which is widened for the number of comparisons.
    """
    pairs = [
        (_purifier(purified), _worst(purified).astype(int) - _worst(plain))
        for purified in results
        for plain in results
        if _purifier(purified) and not _purifier(plain) and _threat(purified) == _threat(plain)
    ]
    best, largest = None, 0.0
    for purifier, change in pairs:
        z = NormalDist().inv_cdf(1 - LEVEL / 2 / len(pairs))
        lower_bound = change.mean() - z * change.std() / len(change) ** 0.5
        if len(change) >= ENOUGH and lower_bound > largest:
            best, largest = purifier, lower_bound
    return best


def _threat(result: dict[str, Any]) -> dict[str, Any]:
    """Return all settings except the purification and the gradients through it."""
    defence = ("purification", "gradient")
    return {key: value for key, value in result["settings"].items() if key not in defence}


def _worst(result: dict[str, Any]) -> np.ndarray:
    """Return booleans (N,): right in every attack stage, and clean."""
    table = np.array([list(marks) for marks in result["samples"].values()])
    worst: np.ndarray = (table == "1").all(axis=0)
    return worst
