"""Labels as the label cache stores them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np

from edgeclip.text.cache import FILE, CachedLabel
from edgeclip.text.label_tokens import DIGEST_SIZE, Cut, LabelTokens

DIM = 64


def cached_labels(first: int, count: int, dim: int = DIM) -> dict[bytes, CachedLabel]:
    """Return keys and their labels, the same in every process."""
    rows = {n: np.random.default_rng(n).standard_normal(dim) for n in range(first, first + count)}
    return {
        n.to_bytes(32, "big"): CachedLabel(
            row.astype(np.float32), LabelTokens(n.to_bytes(DIGEST_SIZE, "little"), Cut(n % 3))
        )
        for n, row in rows.items()
    }


def assert_equal(loaded: dict[bytes, CachedLabel], expected: dict[bytes, CachedLabel]) -> None:
    assert loaded.keys() == expected.keys()
    for key, label in loaded.items():
        assert label.vector.dtype == np.float32
        np.testing.assert_array_equal(label.vector, expected[key].vector)
        assert label.tokens == expected[key].tokens


def execute(cache: Path, statement: str, *values: object) -> None:
    """Run one SQL statement on the file of a cache."""
    db = sqlite3.connect(cache / FILE)
    with db:
        db.execute(statement, values)
    db.close()
