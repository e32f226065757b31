"""The command line: every subcommand is a few lines that call the library. Those that look after an
installation are in `edgeclip.cli.manage`.

Exit status: 0 done, 1 some inputs failed, 2 wrong usage or an unusable bundle.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from edgeclip import __version__, _core
from edgeclip.cli.manage import add_upkeep
from edgeclip.cli.options import Parser
from edgeclip.cli.output import show_trials
from edgeclip.cli.predict import add_predict
from edgeclip.errors import EdgeclipError


def build_parser() -> argparse.ArgumentParser:
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
    _prepare_streams()
    show_trials()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about an image is an error
    try:
        args = build_parser().parse_args(argv)
        _check_core()
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except EdgeclipError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        _abandon_stdout()
        return 0
    except OSError as err:
        _abandon_stdout()
        print(f"error: {err.strerror or err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _check_core() -> None:
    """Raises EdgeclipError where the environment asks for instructions that are not there."""
    try:
        _core.simd()
    except RuntimeError as err:
        raise EdgeclipError(str(err)) from err


def _prepare_streams() -> None:
    """Streams that exist, and that take file names which are not valid text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for the process's life)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # in JSON, too, a valid escape


def _abandon_stdout() -> None:
    """Let what is still buffered vanish, rather than fail again at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
