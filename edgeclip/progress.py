"""Progress bars and lines on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], object]
LINE_INTERVAL = 10.0  # seconds between lines if stderr is not a terminal


def show_progress(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """Yield the items, with a bar if stderr is a terminal and stdout is not."""
    if total < 2 or not sys.stderr.isatty() or sys.stdout.isatty():
        return iter(items)
    from tqdm import tqdm

    return iter(tqdm(items, total=total, unit=unit, delay=1, leave=False))


def text_progress() -> Callable[[int, int], None] | None:
    """Return a callback that draws the encoding of labels; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        return None
    bars: list[Any] = []  # created by the first call: cached labels need no bar

    def update(done: int, total: int) -> None:
        if not bars:
            from tqdm import tqdm

            bars.append(
                tqdm(desc="encoding labels", total=total, unit="prompt", delay=1, leave=False)
            )
        (bar,) = bars
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


@contextmanager
def phase_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback for work in phases, which takes the phase, its finished steps and their total.

    Any thread may call it. It draws a bar on a terminal, else prints a line every LINE_INTERVAL.
    """
    from tqdm import tqdm

    bar: Any = tqdm(unit="step", delay=1, leave=False) if sys.stderr.isatty() else None
    start = printed = time.monotonic()
    lock = threading.Lock()

    def update(phase: str, done: int, total: int) -> None:
        nonlocal printed
        with lock:
            if bar is not None:
                bar.set_description(phase.rpartition(" > ")[2], refresh=False)
                bar.total, bar.n = total, done
                bar.refresh()
            elif time.monotonic() - printed >= LINE_INTERVAL:
                printed = time.monotonic()
                line = f"{phase}: {done} of {total}, after {printed - start:.0f} s"
                print(line, file=sys.stderr, flush=True)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()
