"""Fused graph: normalisation, a bundle's image encoder, CLIPure-Cos, class scores, softmax, top-k.

All operators are standard ONNX. They compute in float32, because TensorRT has no double.
`export.fused` writes the files.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from edgeclip import LabelSet
from edgeclip._core import MIN_SINE
from edgeclip.manifest import ImageSpec
from edgeclip.purify import CosPurifier

TOP_K = 5

Array = NDArray[Any]


@dataclass(frozen=True)
class Head:
    """Settings of the part behind the encoder.

    top_k: classes in an answer; None for all. labels: classes built in; None for an input
    `classes`.
    """

    purifier: CosPurifier | None = None
    top_k: int | None = TOP_K
    labels: LabelSet | None = None

    @property
    def answers(self) -> int | None:
        """Entries of an answer, limited by the number of labels; None for all classes in order."""
        if self.top_k is None or self.labels is None:
            return self.top_k
        return min(self.top_k, len(self.labels))


class _Operators:
    """Builder that appends nodes to a graph; numbers become float32 constants."""

    def __init__(self, graph: ir.Graph) -> None:
        self._tape = Tape(graph)
        self._constants = itertools.count()

    def __call__(self, kind: str, *inputs: ir.Value | float, **attributes: Any) -> ir.Value:
        values = [v if isinstance(v, ir.Value) else self.constant(v) for v in inputs]
        return self._tape.op(kind, values, attributes)

    def constant(self, value: Any, dtype: type = np.float32) -> ir.Value:
        tensor = ir.tensor(np.asarray(value, dtype))
        return self._tape.initializer(tensor, name=f"fused.constant{next(self._constants)}")

    def total(self, x: ir.Value) -> ir.Value:
        """Return the sum of each row, (batch, 1)."""
        return self("ReduceSum", x, self.constant([1], np.int64), keepdims=1)

    def top(self, x: ir.Value, k: int) -> ir.Value:
        """Return the indices of each row's k largest values, the lower index first among equals."""
        inputs = [x, self.constant([k], np.int64)]
        return self._tape.op_multi_out("TopK", inputs, {"axis": 1}, num_outputs=2)[1]


def fuse(
    encoder: ir.Model, image: ImageSpec, null_text: Array, scale: float, input_type: str, head: Head
) -> ir.Model:
    """Extend the graph of `encoder` in place, and return it.

    null_text: float32 (D,). scale: logit scale, which multiplies cosines.
    """
    graph, op = encoder.graph, _Operators(encoder.graph)
    (pixels,) = graph.inputs
    (embedding,) = (value for value in graph.outputs if value.name == "embedding")
    batch = pixels.shape[0] if pixels.shape else None
    graph.inputs.clear()
    graph.outputs.clear()
    pixels.replace_all_uses_with(_normalise(graph, op, batch, image, input_type))

    direction = _direction(op, embedding, null_text, head.purifier)
    classes = _classes(graph, op, head.labels, len(null_text))
    # The logit bias is left out: equal for all classes, it does not change their softmax.
    logits = op("Gemm", direction, classes, alpha=scale, transB=1)
    probabilities = op("Softmax", logits, axis=1)
    if head.answers is None:
        count = "classes" if head.labels is None else len(head.labels)
        _output(graph, "probabilities", probabilities, ir.DataType.FLOAT, [batch, count])
    else:
        order = op.top(logits, head.answers)  # logits: many probabilities may round to 0
        best = op("GatherElements", probabilities, order, axis=1)
        indices = op("Cast", order, to=ir.DataType.INT32)
        _output(graph, "probabilities", best, ir.DataType.FLOAT, [batch, head.answers])
        _output(graph, "indices", indices, ir.DataType.INT32, [batch, head.answers])
    graph.sort()
    RemoveUnusedNodesPass()(encoder)  # nodes and weights of the encoder's other outputs
    NameFixPass()(encoder)  # makes inner names unique; inputs and outputs keep theirs
    if head.labels is not None:
        encoder.metadata_props["labels"] = json.dumps(head.labels.names, ensure_ascii=False)
    return encoder


def _normalise(
    graph: ir.Graph,
    op: _Operators,
    batch: int | ir.SymbolicDim | None,
    image: ImageSpec,
    input_type: str,
) -> ir.Value:
    """Append (v / 255 - mean) / std; this order reproduces `_core.preprocess` exactly."""
    height, width = image.size
    is_uint8 = input_type == "uint8"
    shape = [batch, height, width, 3] if is_uint8 else [batch, 3, height, width]
    dtype = ir.DataType.UINT8 if is_uint8 else ir.DataType.FLOAT
    x = ir.Value(name="image", shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(x)
    if is_uint8:
        x = op("Cast", x, to=ir.DataType.FLOAT)  # first: TensorRT's uint8 inputs allow only a cast
        x = op("Transpose", x, perm=[0, 3, 1, 2])
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (image.mean, image.std))
    return op("Div", op("Sub", op("Div", x, 255.0), op.constant(mean)), op.constant(std))


def _classes(graph: ir.Graph, op: _Operators, labels: LabelSet | None, dim: int) -> ir.Value:
    if labels is not None:
        return op.constant(labels.embeddings)
    shape, dtype = ir.Shape(["classes", dim]), ir.TensorType(ir.DataType.FLOAT)
    graph.inputs.append(ir.Value(name="classes", shape=shape, type=dtype))
    return graph.inputs[-1]


def _output(
    graph: ir.Graph, name: str, value: ir.Value, dtype: ir.DataType, shape: list[Any]
) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    graph.outputs.append(value)


def _direction(
    op: _Operators, z: ir.Value, null_text: Array, purifier: CosPurifier | None
) -> ir.Value:
    """Append csrc/math.h's purification in closed form; return the purified unit embedding.

    The embedding z is split into components along and across the null text t. The angle between z
    and t is computed from these, because 1 - cosine^2 loses all digits when z and t are nearly
    parallel. The result lies in the same plane, at the angle that all steps lead to.
    """
    if purifier is None or purifier.steps == 0 or purifier.step_size == 0:
        return op("Div", z, op("Sqrt", op.total(op("Mul", z, z))))
    t = op.constant((null_text / np.linalg.norm(null_text.astype(np.float64)))[None])
    along, across = _split(op, z, t)
    rest, across = _split(op, across, t)  # rounding leaves a part along t
    along = op("Add", along, rest)
    length = op("Sqrt", op.total(op("Mul", across, across)))
    norm = op("Sqrt", op("Add", op("Mul", along, along), op("Mul", length, length)))
    # tan(angle / 2) = sine / (1 + cosine), for the angle or its supplement, whichever is acute.
    half = op("Atan", op("Div", length, op("Add", norm, op("Abs", along))))
    obtuse_by = op("Sub", math.pi / 2, op("Mul", half, 2.0))
    angle = op("Sub", math.pi / 2, op("Mul", op("Sign", along), obtuse_by))
    angle = _turn(op, angle, op("Div", length, norm), purifier)
    tangent = op("Div", across, op("Max", length, 1e-30))  # 0 for parallel vectors
    return op("Add", op("Mul", op("Cos", angle), t), op("Mul", op("Sin", angle), tangent))


def _split(op: _Operators, z: ir.Value, t: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the component of z along t, and the rest of z."""
    along = op.total(op("Mul", z, t))
    return along, op("Sub", z, op("Mul", along, t))


def _turn(op: _Operators, angle: ir.Value, sine: ir.Value, purifier: CosPurifier) -> ir.Value:
    """Append the angle to the null text after all steps, negative on the far side of it.

    Each step turns the embedding by atan(step size) towards the null text. The first step that
    passes it, `crossing`, is undone by the next one, and so on: from there on, an odd number of
    remaining steps is one step. An angle whose sine is below MIN_SINE has no tangent to follow, and
    stays.
    """
    turn, steps = math.atan(purifier.step_size), float(purifier.steps)
    whole_steps = op("Floor", op("Mul", op("Sub", angle, MIN_SINE), min(1 / turn, 1e30)))
    crossing = op("Max", op("Add", whole_steps, 1.0), 0.0)
    taken = op("Min", crossing, steps)
    remaining = op("Sub", steps, taken)
    odd = op("Sub", remaining, op("Mul", op("Floor", op("Mul", remaining, 0.5)), 2.0))
    turned = op("Sub", angle, op("Mul", taken, turn))
    crossed = op("Cast", op("Less", turned, -MIN_SINE), to=ir.DataType.FLOAT)
    back = op("Mul", op("Mul", odd, crossed), turn)
    moved = op("Add", turned, back)
    return op("Where", op("Less", sine, MIN_SINE), angle, moved)
