"""Answers of a Runtime."""

from __future__ import annotations

from dataclasses import dataclass

from edgeclip.errors import ImageError


@dataclass(frozen=True)
class Prediction:
    """One class of an answer."""

    label: str
    score: float  # softmax probability over all labels
    index: int  # position among the labels


@dataclass(frozen=True)
class FrameAnswer:
    """What `Runtime.stream` says about one frame."""

    index: int  # position among all frames: a gap to the one before tells how many were dropped
    predictions: list[Prediction] | ImageError
