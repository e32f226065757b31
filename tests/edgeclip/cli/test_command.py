"""The exit status and the error line of `run_command`."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeclip.cli.command import run_command
from edgeclip.errors import ImageError


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_the_function_returns(result: int | None, status: int) -> None:
    assert run_command(lambda value: value, result) == status


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ImageError("a.png: no image"), 2, "error: a.png: no image"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), 2, "error: a: No such file"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (OSError("unplugged"), 2, "error: unplugged"),
        (OSError(), 2, "error: OSError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 0, ""),
    ],
    ids=repr,
)
def test_an_error_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ([line] if line else [])


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


PRINT_NAME = """
import sys
from edgeclip.cli.command import run_command
sys.exit(run_command(print, "caf\\udce9"))
"""


def shell(redirection: str, script: str = PRINT_NAME) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with `redirection` as a shell reads it."""
    command = f'set -o pipefail; "$0" -c "$1" {redirection}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, script], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_and_names_that_are_no_text_are_no_errors(closed: str) -> None:
    done = shell(closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if " >&-" in f" {closed}" else "caf\\udce9\n")


def test_a_reader_that_stops_early_is_no_error() -> None:
    many = PRINT_NAME.replace('"caf', '"a" * 1_000_000, "caf')  # more than a pipe holds
    done = shell("| head -c 1", many)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    done = shell("> /dev/full")
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")
