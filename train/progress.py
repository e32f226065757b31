"""Progress messages on stderr while models load and are exported, and noise suppressed."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

REPEAT_EVERY = 10.0  # seconds
NOTICE_AFTER = 2.0  # seconds; a shorter step gets no second line


@contextmanager
def step(text: str) -> Iterator[None]:
    """Show on stderr that the step `text` runs, and how long it takes.

    A terminal gets one live line. Anything else gets a line at the beginning, one about every ten
    seconds, and one at the end of a step that succeeds.
    """
    with _live_line(text) if sys.stderr.isatty() else _lines(text):
        yield


def _live_line(text: str) -> AbstractContextManager[object]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    column = TextColumn("{task.description} ... {task.elapsed:.1f} s", markup=False)
    progress = Progress(column, console=Console(stderr=True), redirect_stdout=False)
    progress.add_task(text, total=None)
    return progress


@contextmanager
def _lines(text: str) -> Iterator[None]:
    started = time.monotonic()
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(REPEAT_EVERY):
            say(f"{text} ... {time.monotonic() - started:.0f} s so far")

    say(f"{text} ...")
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    seconds = time.monotonic() - started
    if seconds >= NOTICE_AFTER:
        say(f"{text} ... done in {seconds:.1f} s")


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and logs of open_clip, timm and torch's exporter; errors are raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def brief(err: BaseException) -> str:
    """Return the first non-empty line of an error's text, or its type."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__
