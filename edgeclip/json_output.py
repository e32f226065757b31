"""JSON output for any parser: UTF-8 in every locale, and no NaN."""

from __future__ import annotations

import io
import json
import math
import sys
from typing import Any, TextIO


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON text that UTF-8 can encode.

    A number that is not finite becomes null. An undecodable byte, such as 0xff in a file name,
    becomes the escape of Python's surrogate for it, such as `\\udcff`.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, indent=indent, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_json(value: Any, indent: int | None = None, out: TextIO | None = None) -> None:
    """Print a value as JSON and flush, by default on stdout."""
    print(to_json(value, indent), file=as_utf8(out or sys.stdout), flush=True)


def as_utf8(stream: TextIO) -> TextIO:
    """Set a stream to UTF-8, whatever the locale, and return it."""
    if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    return stream
