"""Pieces of every training loop: images of an epoch, progress bar, check for a finite loss."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.data.loader import Key, seed_of
from train.errors import SettingsError


class Order(Protocol):
    """Settings that fix the images of each step."""

    @property
    def seed(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def limit_batches(self) -> int: ...


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


def epoch_keys(count: int, epoch: int, settings: Order, rank: int, world: int) -> list[list[Key]]:
    """Return this process's part of each batch in an epoch, as the index and seed of each image."""
    rng = torch.Generator().manual_seed(seed_of(settings.seed, epoch))
    order = torch.randperm(count, generator=rng).tolist()
    share = settings.batch_size // world
    keys = []
    for step in range(count_steps(count, settings.batch_size, settings.limit_batches)):
        start = step * settings.batch_size + rank * share
        indices = order[start : start + share]
        keys.append([(index, seed_of(settings.seed, epoch, index)) for index in indices])
    return keys


def progress_bar(**options: Any) -> Progress:
    """Return a progress bar with a description, the steps done and the time left."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, **options)


def check_finite(step: int, value: float, remedy: str) -> None:
    """Raise SettingsError with the remedy where a step's loss or gradient norm is not finite."""
    if not math.isfinite(value):
        raise SettingsError(f"step {step}: the loss or its gradient is not finite: {remedy}")
