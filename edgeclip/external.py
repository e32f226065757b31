"""Where an ONNX file says that its weights lie, read without the onnx package.

Only the fields on the way to a tensor's `external_data` are followed (onnx.proto's numbers), wherever
tensors may stand: in a graph, in an attribute of a node, in a function.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

Buffer = memoryview

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
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def locations(path: Path) -> set[str]:
    """The files named as external data. Raises ValueError for what is no protobuf, OSError."""
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return set(_locations(memoryview(whole), "model"))  # the map goes with its last view


def _locations(message: Buffer, kind: str) -> Iterator[str]:
    for number, value in _fields(message):
        inner = FIELDS[kind].get(number)
        if inner == "entry":
            entry = {field: bytes(text) for field, text in _fields(value)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode()
        elif inner is not None:
            yield from _locations(value, inner)


def _fields(message: Buffer) -> Iterator[tuple[int, Buffer]]:
    """The fields of a message that hold bytes: number and contents."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            _, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("a field ends behind the file")
            yield key >> 3, message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind} is not known")


def _varint(message: Buffer, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("a number does not end")
