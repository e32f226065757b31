"""Robustness measurements for a bundle's manifest, from files of python -m train.evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from edgeclip.manifest import Robustness
from edgeclip.purify import DiffPurifier, Purifier
from export import ExportError
from train.errors import SettingsError
from train.models.checkpoints import Source
from train.models.trained_prior import TrainedPrior
from train.robustness import result_file
from train.robustness.result_file import CHECK_COUNT, MIN_IMAGES, Result

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
    results = {path: _read(path, source, templates) for path in paths}
    exported = (prior and prior.weights_sha256, prior_gradient)
    for path, result in results.items():
        measured = (result.prior_sha256, result.prior_gradient)
        if isinstance(result.purifier, DiffPurifier) and measured != exported:
            raise ExportError(f"{path} was measured with another prior: name that one with --prior")
    passed = {path: result for path, result in results.items() if _passed(path, result)}
    recommended = _recommended(list(passed.values()))
    rows = [
        _row(path, result)
        for path, result in passed.items()
        if result.purifier in (None, recommended)
    ]
    return tuple(rows), recommended


def _passed(path: Path, result: Result) -> bool:
    """Return whether no check failed. Raises ExportError if one did without purification."""
    failed = [result.checks[number - 1]["name"] for number in result.failed_checks]
    if failed and result.purifier is None:
        raise ExportError(
            f"{path} failed {', '.join(failed)}: a bundle carries only figures that passed every "
            "check"
        )
    return not failed


def _read(path: Path, source: Source, templates: Sequence[str]) -> Result:
    try:
        result = result_file.read(path)
    except SettingsError as err:
        raise ExportError(str(err)) from err
    settings = result.settings
    if settings["weights_sha256"] != source.weights_sha256:
        raise ExportError(
            f"{path} was measured on other weights than {source.name}: evaluate this model"
        )
    if settings["quick_gelu"] != source.quick_gelu:
        raise ExportError(
            f"{path} was measured with another activation: use the same --quickgelu for both"
        )
    if settings["templates"] != list(templates):
        raise ExportError(
            f"{path} was measured with other templates, {settings['templates']}: evaluate "
            "with the bundle's templates"
        )
    if len(result.finished) < settings["samples"]:
        raise ExportError(f"{path} is not finished: run its python -m train.evaluate again")
    if len(result.checks) < CHECK_COUNT:
        raise ExportError(f"{path} was not checked: run its python -m train.evaluate again")
    return result


def _row(path: Path, result: Result) -> Robustness:
    settings = result.settings
    try:
        return Robustness(
            data=settings["data"],
            samples=settings["samples"],
            norm=settings["norm"],
            eps=settings["eps"],
            attacks=tuple(settings["attack"]),
            steps=settings["steps"],
            restarts=settings["restarts"],
            seed=settings["seed"],
            purification=str(result.purifier or "none"),
            clean_accuracy=float(result.clean.mean()),
            worst_case_accuracy=float(result.worst.mean()),
        )
    except (ValueError, TypeError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err}") from err


def _recommended(results: Sequence[Result]) -> Purifier:
    """Return the purification with the largest significant gain in worst-case accuracy, if any.

    A gain is measured on the same images under the same attacks. It counts by the lower end of its
    paired confidence interval, which is widened for the number of comparisons.
    """
    pairs = [
        (purified.purifier, purified.worst.astype(int) - plain.worst)
        for purified in results
        for plain in results
        if purified.purifier and not plain.purifier and _threat(purified) == _threat(plain)
    ]
    best, largest = None, 0.0
    for purifier, change in pairs:
        z = NormalDist().inv_cdf(1 - LEVEL / 2 / len(pairs))
        lower_bound = float(change.mean() - z * change.std() / len(change) ** 0.5)
        if len(change) >= MIN_IMAGES and lower_bound > largest:
            best, largest = purifier, lower_bound
    return best


def _threat(result: Result) -> dict[str, Any]:
    """Return all settings except the purification and the gradients through it."""
    defence = ("purification", "gradient")
    return {name: value for name, value in result.settings.items() if name not in defence}
