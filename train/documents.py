"""Generated blocks of documents, each between two marks: <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from edgeclip import storage
from train.errors import SettingsError


def marks(prefix: str) -> re.Pattern[str]:
    """Return a pattern of the blocks whose names begin with `prefix`; group 2 is the rest of a name."""
    name = re.escape(prefix)
    return re.compile(rf"(<!-- {name}([\w-]*) -->\n).*?(<!-- /{name}\2 -->)", re.DOTALL)


def update(document: Path, prefix: str, render: Callable[[str], str]) -> int:
    """Replace the blocks whose names begin with `prefix`, and return their number.

    render: the rest of a block's name -> its new text. The document is written once, when all blocks
    are rendered. Raises SettingsError for a document that cannot be read or has no such block.
    """
    try:
        old = document.read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        raise SettingsError(f"cannot read {document}: {err}") from err
    new, count = marks(prefix).subn(lambda block: f"{block[1]}{render(block[2])}\n{block[3]}", old)
    if not count:
        raise SettingsError(
            f"{document} needs one line <!-- {prefix} --> and, below it, one <!-- /{prefix} -->"
        )
    storage.write(document, new)
    return count
