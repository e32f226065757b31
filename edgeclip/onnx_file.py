"""External data of an ONNX file, found without the onnx package.

The reader follows only the protobuf fields that lead to a tensor's `external_data` (the numbers are
onnx.proto's), wherever a tensor can be: in a graph, in a node's attribute, in a function.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# Message -> field -> the message in it.
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}  # fmt: skip
KEY, VALUE = 1, 2  # fields of an entry
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}


def locations(path: Path) -> set[str]:
    """Return the names of the files with external data.

    Raises ValueError for a file that is not protobuf, OSError.
    """
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        contents = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return set(_locations(memoryview(contents), "model"))  # the last view closes the map


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    for number, value in _fields(message):
        inner = FIELDS[kind].get(number)
        if inner == "entry":
            entry = {field: bytes(text) for field, text in _fields(value)}
            if entry.get(KEY) == b"location":
                yield entry.get(VALUE, b"").decode()
        elif inner is not None:
            yield from _locations(value, inner)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Iterate over the fields of a message: number, and contents if these are bytes."""
    position = 0
    while position < len(message):
        value = memoryview(b"")
        key, position = _varint(message, position)
        kind = key & 7
        if kind == VARINT:
            _, position = _varint(message, position)
        elif kind in FIXED_SIZES:
            position += FIXED_SIZES[kind]
        elif kind == BYTES:
            size, position = _varint(message, position)
            value = message[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {kind} is unknown")
        if position > len(message):
            raise ValueError("a field ends behind the file")
        yield key >> 3, value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        value, position = value | (byte & 0x7F) << shift, position + 1
        if byte < 0x80:
            return value, position
    raise ValueError("a number does not end")
