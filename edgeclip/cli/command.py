"""The end of a command: its exit status, and one line on stderr for an error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

from edgeclip.errors import EdgeclipError

P = ParamSpec("P")


def run_command(function: Callable[P, int | None], *arguments: P.args, **options: P.kwargs) -> int:
    """Call `function` and return the exit status of the command.

    The status is what `function` returns (None is 0); 0 too where the reader of stdout closes the
    pipe; 2 for an EdgeclipError or OSError, which is printed as one line; 130 after Ctrl-C.
    """
    _prepare_streams()
    try:
        status = function(*arguments, **options)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:  # the reader, such as `head`, needs no more
        _discard_stdout()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (EdgeclipError, OSError) as err:
        _discard_stdout()
        print(f"error: {_message(err)}", file=sys.stderr)
        return 2


def _message(err: Exception) -> str:
    if isinstance(err, OSError) and err.strerror:
        return err.strerror if err.filename is None else f"{err.filename}: {err.strerror}"
    return str(err) or type(err).__name__


def _prepare_streams() -> None:
    """Open streams that the caller closed, and let all of them take names that are no valid text."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for the process's life)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # valid in JSON too


def _discard_stdout() -> None:
    """Discard what stdout cannot write, or Python fails once more when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
