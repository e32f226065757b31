"""Settings of a command: from the command line, checked, and every mistake one clear line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import Any, NoReturn, TypeVar

import torch

from edgeclip.cli.command import run_command
from edgeclip.errors import EdgeclipError
from train.errors import DataError, SettingsError

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """Help with the examples as they are written, and one clear line on wrong usage."""

    def __init__(self, prog: str, positional: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {positional} [options]".replace("  ", " "),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_measurement(self, *, steps: int, samples: int, required: bool) -> None:
        """What accuracy under attack is measured with; steps and samples are defaults."""
        add = self.add_argument
        add("--data", required=required, metavar="NAME[:PATH]", help="data set; its test split")
        add("--eps", type=fraction, required=required, help="in units of [0, 1]: 8/255")
        add("--norm", default="linf", choices=("linf", "l2"))
        add("--steps", type=int, default=steps, help=f"of each attack (default: {steps})")
        add(
            "-n", "--samples", type=int, default=samples, metavar="N",
            help=f"images, drawn by the seed (default: {samples})",
        )  # fmt: skip
        add("--seed", type=int, default=0, help="of the draw and of the attacks (default: 0)")
        add("--batch-size", type=int, default=100, help="images attacked at a time (default: 100)")
        add("--device", default="auto", choices=("auto", "cpu", "cuda"))
        add("--threads", type=int, default=0, help="of torch; 0 leaves its default")
        add("--download", action="store_true", help="fetch the data set where it is missing")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit with its status, see `run_command`."""
    sys.exit(run_command(_run, command))


def _run(command: Callable[[], None]) -> None:
    """Call `command`, and make one line of the errors of PyTorch and of its loaders."""
    try:
        command()
    except torch.OutOfMemoryError as err:
        raise SettingsError(
            "the device is out of memory: lower --batch-size, or raise --accumulate"
        ) from err
    except (EdgeclipError, OSError) as err:
        *traceback, message = str(err).strip().splitlines() or [""]
        if traceback:  # that of the process that read the image
            raise DataError(message.removeprefix("train.errors.DataError: ")) from err
        raise


def check_number(option: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises SettingsError unless low <= value <= high."""
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise SettingsError(f"--{option.replace('_', '-')} must be {limit}, got {value:g}")


def check_eps(option: str, value: float, norm: str) -> None:
    """Raises SettingsError for a size that is negative, or of 255 by mistake."""
    check_number(option, value, 0)
    if norm == "linf" and value >= 1:
        option = option.replace("_", "-")
        raise SettingsError(
            f"--{option} is in units of [0, 1], got {value:g}: for {value:g} of 255 "
            f"give --{option} {value:g}/255"
        )


def parse_settings(cls: type[Settings], prog: str, description: str, epilog: str) -> Settings:
    """A dataclass of settings from the command line: one option per field, its help in metadata."""
    parser = Parser(prog, "", description, epilog)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        option = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
        elif field.metadata.get("type") is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            needed = field.default is dataclasses.MISSING
            choices = field.metadata.get("choices")
            silent = needed or field.default is None  # None: the help says what happens
            parser.add_argument(
                option,
                type=field.metadata.get("type") or type(field.default),
                choices=choices,
                required=needed,
                default=None if needed else field.default,
                metavar=None if choices else field.name.rpartition("_")[2].upper(),
                help=text if silent else f"{text} (default: {_shown(field.default)})",
            )
    return cls(**vars(parser.parse_args()))


def _shown(default: Any) -> str:
    """A default as a user would write it: 1/255 rather than 0.00392156862745098."""
    if isinstance(default, float) and 0 < default < 1:
        fraction = Fraction(default).limit_denominator(255)
        if fraction.denominator == 255 and float(fraction) == default:
            return str(fraction)
    return str(default)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    type: Callable[[str], Any] | None = None,
    choices: Collection[str] | None = None,
) -> Any:
    """A dataclass field that carries its meaning for --help."""
    metadata = {"help": help, "type": type, "choices": choices and tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def fraction(text: str) -> float:
    """A number as a decimal or a fraction: 0.03, 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 8/255, got {text!r}") from None
