"""Command line, run in this process."""

from __future__ import annotations

import pytest

from edgeclip.cli.main import main

BUNDLE = ("--bundle", "garments")  # of commands that read the pictures of garments in examples/


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of a command run in this process."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def errors(stderr: str) -> list[str]:
    """Return the lines of stderr without notes."""
    return [line for line in stderr.splitlines() if not line.startswith("note: ")]
