"""Command line, run in this process."""

from __future__ import annotations

import pytest

from edgeclip.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of a command run in this process."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def errors(stderr: str) -> list[str]:
    """Return the lines of stderr without the note about the embedded bundle."""
    return [line for line in stderr.splitlines() if not line.startswith("note: ")]
