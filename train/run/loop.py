"""Pieces of every training loop: steps of an epoch, progress bar, check for a finite loss."""

from __future__ import annotations

import math
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.errors import SettingsError


def count_steps(images: int, batch_size: int, limit: int) -> int:
    """Return the number of whole batches in an epoch, at most `limit` unless `limit` is 0.

    Raises SettingsError where the images do not fill one batch.
    """
    steps = images // batch_size
    if not steps:
        raise SettingsError(
            f"the training split has fewer images than --batch-size {batch_size}: "
            f"give --batch-size {images} or less"
        )
    return min(steps, limit) if limit else steps


def progress_bar(**options: Any) -> Progress:
    """Return a progress bar with a description, the steps done and the time left."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, **options)


def check_finite(step: int, value: float, remedy: str) -> None:
    """Raise SettingsError with the remedy where a step's loss or gradient norm is not finite."""
    if not math.isfinite(value):
        raise SettingsError(f"step {step}: the loss or its gradient is not finite: {remedy}")
