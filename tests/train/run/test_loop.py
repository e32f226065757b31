"""Pieces of a training loop."""

from __future__ import annotations

import math

import pytest

from train.errors import SettingsError
from train.run.loop import check_finite, count_steps


@pytest.mark.parametrize(
    ("images", "batch_size", "limit", "steps"),
    [(10, 3, 0, 3), (10, 5, 0, 2), (10, 3, 2, 2), (10, 3, 9, 3), (10, 10, 0, 1)],
)
def test_steps_are_whole_batches(images: int, batch_size: int, limit: int, steps: int) -> None:
    assert count_steps(images, batch_size, limit) == steps


def test_data_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(SettingsError, match="fewer images than --batch-size 11: give --batch-size"):
        count_steps(10, 11, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_refused(value: float) -> None:
    check_finite(3, 0.0, "lower --learning-rate")
    with pytest.raises(SettingsError, match=r"^step 3: .* not finite: lower --learning-rate$"):
        check_finite(3, value, "lower --learning-rate")
