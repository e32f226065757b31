"""Evidence of robustness for a bundle's manifest, from result files of python -m train.evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

LEVEL = 0.05  # significance of all comparisons together, two-sided


def read(
    paths: Sequence[Path],
    source: Source,
    templates: Sequence[str],
    prior: TrainedPrior | None = None,
    prior_gradient: str = "exact",
) -> tuple[tuple[Robustness, ...], Purifier]:
    """Return the measurements for the manifest, and the purification that they recommend, if any.

    The measurements are those without purification and with the recommended one. A purified result
    that failed a check is omitted. Raises ExportError for an unpurified one that did, and for a result
    that is unfinished, unchecked, or of other weights, templates or prior: a bundle contains no figure
    of another model and none that cannot be trusted.
    """
    results = {path: _read(path, source, templates) for path in paths}
    expected = (prior and prior.weights_sha256, prior_gradient)
    for path, result in results.items():
        measured = (result.prior_sha256, result.prior_gradient)
        if isinstance(result.purifier, DiffPurifier) and measured != expected:
            raise ExportError(f"{path} was measured with another prior: name that one with --prior")
    passed = {path: result for path, result in results.items() if _passed(path, result)}
    recommended = _recommended(list(passed.values()))
    rows = {p: r for p, r in passed.items() if r.purifier in (None, recommended)}
    return tuple(_row(path, result) for path, result in rows.items()), recommended


def _passed(path: Path, result: Result) -> bool:
    """Return whether every check passed. Raises ExportError for an unpurified result that failed."""
    failed = [result.checks[number - 1]["name"] for number in result.failed_checks]
    if failed and result.purifier is None:
        raise ExportError(
            f"{path} failed {', '.join(failed)}: a bundle contains only figures that passed every check"
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
            f"{path} was measured on other weights than those of {source.name}: measure these"
        )
    if settings["quick_gelu"] != source.quick_gelu:
        raise ExportError(
            f"{path} was measured with another activation: give both commands the same --quickgelu"
        )
    if settings["templates"] != list(templates):
        raise ExportError(
            f"{path} was measured with other templates than the bundle's, "
            f"{settings['templates']}: measure with these"
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
    """Return the purification whose worst case is highest above the one without purification.

    Both are on the same images under the same attacks. The difference must exceed the interval of the
    paired difference, widened for the number of comparisons: no bundle recommends a chance result.
    """
    pairs = [
        (purified.purifier, purified.worst.astype(int) - plain.worst)
        for purified in results
        for plain in results
        if purified.purifier and not plain.purifier and _attack(purified) == _attack(plain)
    ]
    best, highest = None, 0.0
    for purifier, change in pairs:
        z = NormalDist().inv_cdf(1 - LEVEL / 2 / len(pairs))
        lower = float(change.mean() - z * change.std() / len(change) ** 0.5)
        if len(change) >= MIN_IMAGES and lower > highest:
            best, highest = purifier, lower
    return best


def _attack(result: Result) -> Mapping[str, Any]:
    """Return all settings but the purification and the gradients through it."""
    purification = ("purification", "gradient")
    return {name: value for name, value in result.settings.items() if name not in purification}
