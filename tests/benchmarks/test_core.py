"""Benchmark of the core: the calls that it measures."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.core import BIG, reads


def test_reading_is_shared_by_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.core.cores", lambda: 3)
    array = np.zeros(int(BIG) // 4 + 2, np.float32)
    array[-1] = 7
    calls = reads(array)
    assert list(calls) == ["read: max", "read: max, 3 threads", "read: or", "read: or, 3 threads"]
    assert calls["read: max"]() == 7
    assert calls["read: max, 3 threads"]() == [0, 0, 7]
