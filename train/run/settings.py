"""Settings of a command, read from the command line and checked; each error is one clear line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Collection
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from edgeclip.cli.command import run_command
from edgeclip.errors import EdgeclipError
from train.errors import DataError, SettingsError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


class Parser(argparse.ArgumentParser):
    """Argument parser that keeps the line breaks of the examples; its errors are one line."""

    def __init__(self, prog: str, positional: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {positional} [options]".replace("  ", " "),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_measurement(self, *, steps: int, samples: int, required: bool) -> None:
        """Add the options of a measurement under attack; `steps` and `samples` are defaults."""
        add = self.add_argument
        add(
            "--data",
            required=required,
            metavar="NAME[:PATH]",
            help="data set; its test split is used",
        )
        add(
            "--eps",
            type=fraction,
            required=required,
            help="largest perturbation, in units of [0, 1]: 8/255",
        )
        add(
            "--norm",
            default="linf",
            choices=("linf", "l2"),
            help="norm of the perturbation (default: linf)",
        )
        add("--steps", type=int, default=steps, help=f"steps of each attack (default: {steps})")
        add(
            "-n", "--samples", type=int, default=samples, metavar="N",
            help=f"number of images, drawn by the seed (default: {samples})",
        )  # fmt: skip
        add("--seed", type=int, default=0, help="seed of the draw and of the attacks (default: 0)")
        add("--batch-size", type=int, default=100, help="images attacked at a time (default: 100)")
        add(
            "--device",
            default="auto",
            choices=("auto", "cpu", "cuda"),
            help="device of torch (default: auto)",
        )
        add("--threads", type=int, default=0, help="threads of torch; 0 leaves its default")
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
    """Raise SettingsError unless low <= value <= high."""
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise SettingsError(f"--{option.replace('_', '-')} must be {limit}, got {value:g}")


def check_eps(option: str, value: float, norm: str) -> None:
    """Raise SettingsError for a negative perturbation, or one in units of [0, 255] by mistake."""
    check_number(option, value, 0)
    if norm == "linf" and value >= 1:
        option = option.replace("_", "-")
        raise SettingsError(
            f"--{option} is in units of [0, 1], got {value:g}: for {value:g} of 255 "
            f"give --{option} {value:g}/255"
        )


def check_ranges(settings: DataclassInstance) -> None:
    """Raise SettingsError for a number outside the range of its setting."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, (int, float)):
            check_number(field.name, value, field.metadata["low"], field.metadata["high"])


def to_record(settings: DataclassInstance) -> dict[str, Any]:
    """Return the settings as a checkpoint and a configuration keep them.

    Paths are strings. A tuple of one value is that value, of several a list.
    """
    return {key: _recorded(value) for key, value in dataclasses.asdict(settings).items()}


def _recorded(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value) if len(value) > 1 else value[0]
    return str(value) if isinstance(value, Path) else value


def parse_settings(cls: type[Settings], prog: str, description: str, epilog: str) -> Settings:
    """Parse the command line into a dataclass of settings: one option per field, required first."""
    parser = Parser(prog, "", description, epilog)
    fields = dataclasses.fields(cls)
    for field in sorted(fields, key=lambda field: field.default is not dataclasses.MISSING):
        option = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
        elif field.metadata.get("type") is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            needed = field.default is dataclasses.MISSING
            choices = field.metadata.get("choices")
            no_default = needed or field.default is None  # the help text explains None
            parser.add_argument(
                option,
                action="append" if field.metadata["repeat"] else "store",
                type=field.metadata.get("type") or type(field.default),
                choices=choices,
                required=needed,
                default=None if needed else field.default,
                metavar=None if choices else field.name.rpartition("_")[2].upper(),
                help=text if no_default else f"{text} (default: {_format_default(field.default)})",
            )
    values = vars(parser.parse_args()).items()
    return cls(**{name: tuple(x) if isinstance(x, list) else x for name, x in values})


def _format_default(default: Any) -> str:
    """Format a default as a user would write it: 1/255 rather than 0.00392156862745098."""
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
    low: float = 0,
    high: float = math.inf,
    repeat: bool = False,
) -> Any:
    """Return a dataclass field with its help text, type, choices, and the numbers it may be.

    repeat: the option may be given several times, and the field is a tuple.
    """
    metadata: dict[str, Any] = {"help": help, "type": type, "low": low, "high": high}
    metadata["repeat"] = repeat
    metadata["choices"] = choices and tuple(choices)
    return dataclasses.field(default=default, metadata=metadata)


def fraction(text: str) -> float:
    """Parse a number written as a decimal or a fraction: 0.03, 8/255, 1.5/255."""
    top, slash, bottom = text.partition("/")
    try:
        return float(Fraction(top) / Fraction(float(bottom) if slash else 1))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 8/255, got {text!r}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Settings that choose a model's weights, as train.models.weight_options does."""

    pretrained: str | None = setting(
        None, help="tag of open_clip's or a file of weights; a folder has its own", type=str
    )
    visual: str | None = setting(
        None,
        help="file with weights of the image tower alone, over those of --pretrained",
        type=str,
    )
    quickgelu: bool | None = setting(
        None, help="build with QuickGELU or GELU (default: as the weights were trained)", type=bool
    )
