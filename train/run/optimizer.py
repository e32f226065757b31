"""Optimizer and learning-rate schedule of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Return the parameters in two groups: matrices decay, vectors and scalars do not."""
    everything = list(parameters)
    return [
        {"params": [p for p in everything if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in everything if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, total: int, peak: float, warmup_steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine towards zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
