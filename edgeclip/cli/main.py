"""The command `edgeclip` and its parser.

The subcommands are in `edgeclip.cli.predict` and `edgeclip.cli.manage`.

Exit status: 0 done, 1 some inputs failed, 2 wrong usage or an error, 130 interrupted.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from edgeclip import __version__, _core
from edgeclip.cli.command import run_command
from edgeclip.cli.manage import add_upkeep
from edgeclip.cli.options import Parser
from edgeclip.cli.output import show_trials
from edgeclip.cli.predict import add_predict
from edgeclip.errors import EdgeclipError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `edgeclip` with all of its subcommands."""
    parser = Parser(
        prog="edgeclip",
        description="Zero-shot image classification with CLIP, without PyTorch.",
        epilog='example: edgeclip classify photo.jpg --label "a cat" --label "a dog"',
    )
    parser.add_argument("--version", action="version", version=f"edgeclip {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_predict(commands)
    add_upkeep(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(_run, argv)


def _run(argv: Sequence[str] | None) -> int:
    show_trials()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about an image is an error
    args = build_parser().parse_args(argv)
    _check_core()
    status: int = args.run(args)
    return status


def _check_core() -> None:
    """Raise EdgeclipError if the environment asks for instructions that the processor lacks."""
    try:
        _core.simd()
    except RuntimeError as err:
        raise EdgeclipError(str(err)) from err
