"""The command line's parser, and the kinds of values that its options take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from edgeclip import precisions
from edgeclip.errors import EdgeclipError
from edgeclip.labels import STDIN

DEVICES = ("auto", "cpu", "cuda", "tensorrt")
MAX_SECONDS = 3600
PRECISIONS = tuple(precisions.PRECISIONS)
PRECISIONS_OF_ENGINES = ("auto", *precisions.engine_precisions())
PURIFICATIONS = ("auto", "none", "cos", "diff")


class Parser(argparse.ArgumentParser):
    """One clear line on wrong usage, rather than the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    """A subcommand: what it does in a line, and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_threads(parser: argparse.ArgumentParser, limit: int) -> None:
    parser.add_argument(
        "--threads",
        type=up_to(limit),
        metavar="T",
        help="default: as many as affinity and CPU quota allow",
    )


def check_stdin(*given: str | None) -> None:
    """Raise EdgeclipError where more than one argument is standard input."""
    if given.count(STDIN) > 1:
        raise EdgeclipError(
            "- is given twice, but standard input can be read only once: name files"
        )


def add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=["table", "json"], help="default: table on a terminal, else json"
    )


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
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    value = _number(text)
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds up to {MAX_SECONDS}, got {text!r}")
    return value


def _number(text: str) -> float:
    """Not a number where it is none, or infinite."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
