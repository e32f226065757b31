"""Predictions: the answers of a Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import ImageError


@dataclass(frozen=True)
class Prediction:
    """One label of an answer."""

    label: str
    score: float  # softmax probability over all labels
    index: int  # position among the labels


@dataclass(frozen=True)
class FrameAnswer:
    """Answer of `Runtime.stream` for one frame."""

    index: int  # position among all frames; a gap counts the dropped ones
    predictions: list[Prediction] | ImageError


def to_predictions(
    names: Sequence[str], indices: NDArray[np.int32], scores: NDArray[np.float32]
) -> list[list[Prediction]]:
    """Name the labels of ranked indices and scores (N, k): one list per row."""
    return [
        [Prediction(names[i], score, i) for i, score in zip(row, row_scores, strict=True)]
        for row, row_scores in zip(indices.tolist(), scores.tolist(), strict=True)
    ]


def score_table(indices: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scores (N, K) that are ranked by `indices` (N, K) in the order of the labels."""
    table = np.empty_like(scores)
    np.put_along_axis(table, indices.astype(np.int64), scores, axis=1)
    return table
