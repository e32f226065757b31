"""What the exporter says while it works, and the noise of libraries that it keeps from the user."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOTICE_AFTER = 2  # seconds in which nobody wonders


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say on stderr that `text` is being done, how long it has been so far, and how long it took."""
    live = sys.stderr.isatty()
    started = time.monotonic()
    done = threading.Event()
    say(f"{text} ...", end="" if live else "\n")
    ticker = threading.Thread(target=_tick, args=(text, started, done, live), daemon=True)
    ticker.start()
    try:
        yield
    except BaseException:
        done.set()
        ticker.join()
        if live:
            say("")
        raise
    done.set()
    ticker.join()
    seconds = time.monotonic() - started
    if live:
        say(f"\r{text} ... {seconds:.1f} s")
    elif seconds >= NOTICE_AFTER:
        say(f"{text} ... done in {seconds:.1f} s")


def _tick(text: str, started: float, done: threading.Event, live: bool) -> None:
    while not done.wait(1 if live else 10):
        seconds = time.monotonic() - started
        if live and seconds >= NOTICE_AFTER:
            say(f"\r{text} ... {seconds:.0f} s", end="")
        elif not live:
            say(f"{text} ... {seconds:.0f} s so far")


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what open_clip, timm and torch's exporter log and warn about: what matters is raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def brief(err: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__
