"""Measurements under attack for a bundle's manifest, from the files of python -m train.evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgeclip.manifest import Robustness
from export import ExportError
from export.checkpoints import Source


def read(paths: Sequence[Path], source: Source, templates: Sequence[str]) -> tuple[Robustness, ...]:
    """What was measured, one entry for each file.

    Raises ExportError for a file that is not finished, or not of these weights and templates: a
    bundle carries no figure of another model.
    """
    return tuple(_read(path, source, templates) for path in paths)


def _read(path: Path, source: Source, templates: Sequence[str]) -> Robustness:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = found["settings"]
        if "worst_case_accuracy" not in found:
            raise ExportError(f"{path} is not finished: run its python -m train.evaluate again")
        if settings["weights_sha256"] != source.weights_sha256:
            raise ExportError(
                f"{path} was measured on other weights than those of {source.name}: measure these"
            )
        if settings["templates"] != list(templates):
            raise ExportError(
                f"{path} was measured with other templates than the bundle's, "
                f"{settings['templates']}: measure with these"
            )
        return Robustness(
            attacks=tuple(settings["attack"]),
            clean_accuracy=found["clean_accuracy"],
            worst_case_accuracy=found["worst_case_accuracy"],
            **{
                name: settings[name]
                for name in (
                    "data", "samples", "norm", "eps", "steps", "restarts", "seed", "purification"
                )
            },
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ExportError(f"{path} is no result of python -m train.evaluate: {err!r}") from err
