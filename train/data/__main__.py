"""Command that lists the data sets."""

from __future__ import annotations

import sys

from edgeclip.cli.command import run_command
from edgeclip.cli.options import Parser
from train.data.catalog import SOURCES
from train.data.dataset import USER_SETS
from train.data.samples import default_root


def main(arguments: list[str] | None = None) -> None:
    """List the public data sets."""
    Parser(prog="python -m train.data", description="List the data sets.").parse_args(arguments)
    for name, source in SOURCES.items():
        splits = "train, test" if source.trains else "test"
        folder = default_root() / source.folder
        print(f"{name:16}{source.count:5} classes  {splits:12} {folder}")
    for name, path in USER_SETS.items():
        print(f"{name}:{path}")


if __name__ == "__main__":
    sys.exit(run_command(main))
