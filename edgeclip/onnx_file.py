"""What has to be known of an ONNX file, and changed in it, without the onnx package.

Where it says that its weights lie: only the fields on the way to a tensor's `external_data` are followed
(onnx.proto's numbers), wherever tensors may stand: in a graph, in an attribute of a node, in a function.
And its outputs: ONNX Runtime computes all nodes, also those that lead to none.
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
GRAPH, NODE, OUTPUT = 7, 1, 12  # of a model, of a graph
NODE_INPUT, NODE_OUTPUT, OUTPUT_NAME = 1, 2, 1
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


def without_output(path: Path, name: str) -> bytes:
    """The model in a file without the output `name` of its graph, and without the nodes that lead to
    no other. Raises OSError, ValueError for what is no such model, or has branches or loops."""
    model = memoryview(path.read_bytes())
    parts: list[Buffer | bytes] = []
    for number, begin, end, value in _spans(model):
        if number != GRAPH:
            parts.append(model[begin:end])
            continue
        kept = list(_kept(value, name))
        parts += [_number(GRAPH << 3 | BYTES), _number(sum(map(len, kept))), *kept]
    return b"".join(parts)


def _kept(graph: Buffer, name: str) -> Iterator[Buffer]:
    """The fields of a graph, which are in order: every node behind those that it needs."""
    fields = list(_spans(graph))
    if any(_has_graph(value) for number, _, _, value in fields if number == NODE):
        raise ValueError("it has graphs within its graph")  # which use what no input names
    outputs = {_name(value) for number, _, _, value in fields if number == OUTPUT}
    needed = outputs - {name}
    dead = set()
    for number, begin, _, value in reversed(fields):
        if number != NODE:
            continue
        if _texts(value, NODE_OUTPUT) & needed:
            needed |= _texts(value, NODE_INPUT)
        else:
            dead.add(begin)
    for number, begin, end, value in fields:
        if begin not in dead and not (number == OUTPUT and _name(value) == name):
            yield graph[begin:end]


def _has_graph(node: Buffer) -> bool:
    """Whether a node has an attribute that is a graph, or graphs."""
    inner = (
        FIELDS["attribute"].get(field)
        for n, a in _fields(node)
        if n == 5
        for field, _ in _fields(a)
    )
    return "graph" in inner


def _name(output: Buffer) -> str:
    (text,) = _texts(output, OUTPUT_NAME)
    return text


def _texts(message: Buffer, wanted: int) -> set[str]:
    return {str(value, "utf-8") for number, value in _fields(message) if number == wanted}


def _fields(message: Buffer) -> Iterator[tuple[int, Buffer]]:
    """The fields of a message: number, and contents where these are bytes."""
    for number, _, _, value in _spans(message):
        yield number, value


def _spans(message: Buffer) -> Iterator[tuple[int, int, int, Buffer]]:
    """The fields of a message: number, begin and end, and contents where these are bytes."""
    at = 0
    while at < len(message):
        begin, value = at, memoryview(b"")
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
            value = message[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind} is not known")
        yield key >> 3, begin, at, value


def _number(value: int) -> bytes:
    """As a varint."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


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
