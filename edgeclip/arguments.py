"""The command line's parser, and the kinds of values that its options take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """One clear line on wrong usage, rather than the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def up_to(limit: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = positive(text)
        if value > limit:
            raise argparse.ArgumentTypeError(f"expected a whole number up to {limit}, got {value}")
        return value

    return parse


def from_zero(limit: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) <= len(str(limit)) and int(text) <= limit):
            raise argparse.ArgumentTypeError(f"expected a number from 0 to {limit}, got {text!r}")
        return int(text)

    return parse


def step_size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value
