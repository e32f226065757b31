"""Learning-rate schedule and parameter groups."""

from __future__ import annotations

import math

import pytest
import torch

from train.run.optimizer import learning_rate, parameter_groups, set_learning_rate


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, 0.5, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == rates[10] == 0.5
    assert rates[54] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 44 / 90)))
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_learning_rate_without_a_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(0, 10, 0.5, 0) == 0.5


def test_matrices_alone_decay() -> None:
    matrix, vector, scalar = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 3), 4, ()))
    groups = parameter_groups([vector, matrix, scalar], 0.1)
    assert groups == [
        {"params": [matrix], "weight_decay": 0.1},
        {"params": [vector, scalar], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
