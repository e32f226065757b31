"""The core's benchmark, without its measurements."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.core import BIG, reads


def test_reading_is_shared_by_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.core.cores", lambda: 3)
    array = np.zeros(int(BIG) // 4 + 2, np.float32)
    array[-1] = 7
    found = reads(array)
    assert list(found) == ["read: max", "read: max, 3 threads", "read: or", "read: or, 3 threads"]
    assert found["read: max"]() == 7
    assert found["read: max, 3 threads"]() == [0, 0, 7]
