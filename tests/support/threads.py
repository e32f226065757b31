"""Threads that tests start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT = 30  # seconds until a test fails; none measures time


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    """Check that every thread started in the block ends with it."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
