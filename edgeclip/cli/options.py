"""Parser, options and types of values that commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from edgeclip import precisions
from edgeclip.backends.select import DEVICES
from edgeclip.bundle import DEFAULT, EMBEDDED
from edgeclip.errors import EdgeclipError
from edgeclip.labels import STDIN
from edgeclip.purify import (
    MAX_SEED,
    MAX_STEPS,
    MAX_TIMESTEP,
    CosPurifier,
    DiffPurifier,
    Purifier,
    resolve,
)

MAX_SECONDS = 3600
BUNDLE_HELP = (
    f"bundle directory, or an embedded bundle's name: {', '.join(EMBEDDED)} (default: {DEFAULT})"
)
PRECISIONS = tuple(precisions.PRECISIONS)
PRECISIONS_OF_ENGINES = ("auto", *precisions.engine_precisions())
PURIFICATIONS = ("auto", "none", "cos", "diff")
KINDS = {"cos": CosPurifier, "diff": DiffPurifier}
NUMBERS = ("steps", "step_size", "timesteps", "seed")


class Parser(argparse.ArgumentParser):
    """Argument parser that prints one line for wrong usage, instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class PurifierOptions:
    """Options for the purification: --purify names a method, the others set its numbers.

    methods: values of --purify. prefix: start of the names of the other options. published: cos and
    diff have the published numbers by default, whatever the bundle recommends.
    """

    methods: tuple[str, ...] = PURIFICATIONS
    prefix: str = ""
    published: bool = False

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the options to a parser."""
        add_purify(parser, self.methods)
        default = "default: " if self.published else "default: the bundle's, or "

        def add(name: str, text: str, number: str, **keywords: Any) -> None:
            parser.add_argument(self._option(name), help=f"{text} ({default}{number})", **keywords)

        methods = " and ".join(self._methods("steps"))
        add("steps", f"steps of {methods}", "10", type=up_to(MAX_STEPS), metavar="N")
        add("step_size", f"step size of {methods}", "30", type=step_size, metavar="SIZE")
        if "diff" in self.methods:
            times = {"type": from_zero(MAX_TIMESTEP), "nargs": 2, "metavar": ("FIRST", "LAST")}
            add("timesteps", "range that diff draws timesteps from", "900 999", **times)
            add("seed", "seed of diff's draws", "0", type=from_zero(MAX_SEED), metavar="S")

    def purifier(self, args: argparse.Namespace, recommended: Purifier) -> Purifier:
        """Return the purifier that the parsed options name.

        recommended: the bundle's purifier. Raises EdgeclipError for a number that does not fit.
        """
        named = args.purify in KINDS
        purifier = resolve(args.purify, None if named and self.published else recommended)
        numbers: dict[str, Any] = {}
        for name in NUMBERS:
            value = getattr(args, self._destination(name), None)
            if value is None:
                continue
            methods = self._methods(name)
            if args.purify not in methods:
                raise EdgeclipError(f"{self._option(name)} needs --purify {' or '.join(methods)}")
            numbers[name] = tuple(value) if name == "timesteps" else value
        first, last = numbers.get("timesteps", (0, 0))
        if first > last:
            raise EdgeclipError(f"{self._option('timesteps')}: {first} is after {last}")
        return purifier and replace(purifier, **numbers)

    def _methods(self, number: str) -> list[str]:
        """Return the methods that have a number of this name."""
        return [name for name in self.methods if name in KINDS and hasattr(KINDS[name], number)]

    def _destination(self, number: str) -> str:
        return f"{self.prefix}{number}".replace("-", "_")

    def _option(self, number: str) -> str:
        return "--" + self._destination(number).replace("_", "-")


def add_purify(parser: argparse.ArgumentParser, methods: tuple[str, ...] = PURIFICATIONS) -> None:
    """Add the option --purify to a parser."""
    parser.add_argument(
        "--purify",
        default="auto",
        choices=methods,
        help="purification method (default: auto, the bundle's recommendation, or none)",
    )


def add_command(commands: Any, name: str, text: str, epilog: str) -> argparse.ArgumentParser:
    """Add a subcommand with its description, one line, and its examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_device(
    parser: argparse.ArgumentParser, default: str = "auto, the first usable of tensorrt, cuda, cpu"
) -> None:
    """Add the option --device."""
    parser.add_argument(
        "--device",
        default="auto",
        choices=DEVICES,
        help=f"device of the image encoder (default: {default})",
    )


def add_threads(parser: argparse.ArgumentParser, limit: int) -> None:
    """Add the option --threads."""
    parser.add_argument(
        "--threads",
        type=up_to(limit),
        metavar="T",
        help="number of CPU threads (default: all that affinity and CPU quota allow)",
    )


def check_stdin(*arguments: str | None) -> None:
    """Raise EdgeclipError if more than one argument is standard input."""
    if arguments.count(STDIN) > 1:
        raise EdgeclipError(
            "- is given twice, but standard input can be read only once: name files"
        )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the option --format of a report."""
    parser.add_argument(
        "--format",
        choices=["table", "json"],
        help="output format (default: table on a terminal, else json)",
    )


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    value = int(text) if text.isdecimal() and len(text) < 10 else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def up_to(limit: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from 1 to `limit`."""

    def parse(text: str) -> int:
        value = positive(text)
        if value > limit:
            raise argparse.ArgumentTypeError(f"expected a whole number up to {limit}, got {value}")
        return value

    return parse


def from_zero(limit: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from 0 to `limit`."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and len(text) <= len(str(limit)) and int(text) <= limit):
            raise argparse.ArgumentTypeError(
                f"expected a whole number from 0 to {limit}, got {text!r}"
            )
        return int(text)

    return parse


def step_size(text: str) -> float:
    """Parse a number from 0."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    value = _number(text)
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds up to {MAX_SECONDS}, got {text!r}")
    return value


def _number(text: str) -> float:
    """Return a decimal or a fraction such as 1/3 as a number, or NaN for any other text."""
    try:
        numerator, slash, denominator = text.partition("/")
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        return math.nan
    return value if math.isfinite(value) else math.nan
