"""Progress of long work, shown on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], object]
SAY_EVERY = 10.0  # seconds, where there is no terminal to draw a bar on


def show_progress(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items, with a bar on stderr where a person watches and the answers go elsewhere."""
    if total < 2 or not sys.stderr.isatty() or sys.stdout.isatty():
        return iter(items)
    from tqdm import tqdm

    return iter(tqdm(items, total=total, unit=unit, delay=1, leave=False))


def text_progress() -> Callable[[int, int], None] | None:
    """A bar on stderr for the encoding of labels, where a person watches."""
    if not sys.stderr.isatty():
        return None
    bars: list[Any] = []  # one, once there is something to encode

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
    """For work in phases that takes minutes: called with a phase, steps done and steps in all, from
    any thread. A bar on stderr where a person watches, and now and then a line elsewhere."""
    from tqdm import tqdm

    bar: Any = tqdm(unit="step", delay=1, leave=False) if sys.stderr.isatty() else None
    began = said = time.monotonic()
    lock = threading.Lock()

    def tell(phase: str, done: int, total: int) -> None:
        nonlocal said
        with lock:
            if bar is not None:
                bar.set_description(phase.rpartition(" > ")[2], refresh=False)
                bar.total, bar.n = total, done
                bar.refresh()
            elif time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                line = f"{phase}: {done} of {total}, after {said - began:.0f} s"
                print(line, file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if bar is not None:
            bar.close()
