"""The fused graph itself: what comes before and after a bundle's image encoder.

Standard operators in float32, as TensorRT has no double: see `export.fused` for its files.
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
    """What follows the encoder.

    top_k: classes in an answer, all of them for None. labels: built in, or an input for None.
    """

    purifier: CosPurifier | None = None
    top_k: int | None = TOP_K
    labels: LabelSet | None = None

    @property
    def answers(self) -> int | None:
        """Entries of an answer: not more than there are labels. None for one for each class."""
        if self.top_k is None or self.labels is None:
            return self.top_k
        return min(self.top_k, len(self.labels))


class _Operators:
    """Appends nodes to a graph; numbers become float32 constants."""

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
        """The sum of each row, (batch, 1)."""
        return self("ReduceSum", x, self.constant([1], np.int64), keepdims=1)

    def top(self, x: ir.Value, k: int) -> ir.Value:
        """Positions of the k largest of each row, the lower first among equals."""
        inputs = [x, self.constant([k], np.int64)]
        return self._tape.op_multi_out("TopK", inputs, {"axis": 1}, num_outputs=2)[1]


def fuse(
    encoder: ir.Model, image: ImageSpec, null_text: Array, scale: float, input_type: str, head: Head
) -> ir.Model:
    """The graph of `encoder`, with what comes before and after it: changed, and returned.

    null_text is float32 (D,), scale what multiplies cosines.
    """
    graph, op = encoder.graph, _Operators(encoder.graph)
    (pixels,) = graph.inputs
    (embedding,) = (value for value in graph.outputs if value.name == "embedding")
    graph.inputs.clear()
    graph.outputs.clear()
    pixels.replace_all_uses_with(_normalise(graph, op, pixels.shape[0], image, input_type))

    direction = _direction(op, embedding, null_text, head.purifier)
    classes = _classes(graph, op, head.labels, len(null_text))
    # The same bias for all classes would leave their softmax as it is.
    logits = op("Gemm", direction, classes, alpha=scale, transB=1)
    probabilities = op("Softmax", logits, axis=1)
    batch = pixels.shape[0]
    if head.answers is None:
        count = "classes" if head.labels is None else len(head.labels)
        _output(graph, "probabilities", probabilities, ir.DataType.FLOAT, [batch, count])
    else:
        order = op.top(logits, head.answers)  # not of probabilities, of which many may be 0
        best = op("GatherElements", probabilities, order, axis=1)
        indices = op("Cast", order, to=ir.DataType.INT32)
        _output(graph, "probabilities", best, ir.DataType.FLOAT, [batch, head.answers])
        _output(graph, "indices", indices, ir.DataType.INT32, [batch, head.answers])
    graph.sort()
    RemoveUnusedNodesPass()(encoder)  # of an output that nobody asked for, and their weights
    NameFixPass()(encoder)  # inputs and outputs keep theirs
    if head.labels is not None:
        encoder.metadata_props["labels"] = json.dumps(head.labels.names, ensure_ascii=False)
    return encoder


def _normalise(
    graph: ir.Graph, op: _Operators, batch: int | ir.SymbolicDim, image: ImageSpec, kind: str
) -> ir.Value:
    """(v / 255 - mean) / std in this order, which gives the very values of `_core.preprocess`."""
    height, width = image.size
    shape = [batch, height, width, 3] if kind == "uint8" else [batch, 3, height, width]
    dtype = ir.DataType.UINT8 if kind == "uint8" else ir.DataType.FLOAT
    given = ir.Value(name="image", shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(given)
    if kind == "uint8":  # TensorRT takes it for nothing but this
        x = op("Cast", given, to=ir.DataType.FLOAT)
        x = op("Transpose", x, perm=[0, 3, 1, 2])
    else:
        x = given
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
    """The unit embedding, purified: csrc/math.h in float32, which is what TensorRT has.

    The embedding z is split into what is along the null text t and what is across. Neither the angle
    between nor the direction across is then a small difference of large numbers, as 1 - cosine^2 is
    where they are nearly parallel. After all steps there is the angle at which the embedding ends up.
    """
    if purifier is None or purifier.steps == 0 or purifier.step_size == 0:
        return op("Div", z, op("Sqrt", op.total(op("Mul", z, z))))
    t = op.constant((null_text / np.linalg.norm(null_text.astype(np.float64)))[None])
    along, across = _split(op, z, t)
    rest, across = _split(op, across, t)  # what rounding left along t
    along = op("Add", along, rest)
    length = op("Sqrt", op.total(op("Mul", across, across)))
    norm = op("Sqrt", op("Add", op("Mul", along, along), op("Mul", length, length)))
    # tan(angle / 2) = sine / (1 + cosine), of the acute one of the angle and its supplement.
    half = op("Atan", op("Div", length, op("Add", norm, op("Abs", along))))
    obtuse_by = op("Sub", math.pi / 2, op("Mul", half, 2.0))
    angle = op("Sub", math.pi / 2, op("Mul", op("Sign", along), obtuse_by))
    angle = _turn(op, angle, op("Div", length, norm), purifier)
    tangent = op("Div", across, op("Max", length, 1e-30))  # 0 where there is none
    return op("Add", op("Mul", op("Cos", angle), t), op("Mul", op("Sin", angle), tangent))


def _split(op: _Operators, z: ir.Value, t: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How long z is along t, and z without that."""
    along = op.total(op("Mul", z, t))
    return along, op("Sub", z, op("Mul", along, t))


def _turn(op: _Operators, angle: ir.Value, sine: ir.Value, purifier: CosPurifier) -> ir.Value:
    """The angle to the null text after all steps, negative on the other side of it.

    Each step turns by atan(step size) towards the null text. The first that passes it, `crossing`,
    is undone by the next one, and so on: what then counts is whether an odd number of steps is left.
    An angle whose sine is below MIN_SINE has no tangent to follow, and stays.
    """
    turn, steps = math.atan(purifier.step_size), float(purifier.steps)
    ahead = op("Mul", op("Sub", angle, MIN_SINE), min(1 / turn, 1e30))
    crossing = op("Max", op("Add", op("Floor", ahead), 1.0), 0.0)
    taken = op("Min", crossing, steps)
    left = op("Sub", steps, taken)
    odd = op("Sub", left, op("Mul", op("Floor", op("Mul", left, 0.5)), 2.0))
    turned = op("Sub", angle, op("Mul", taken, turn))
    crossed = op("Cast", op("Less", turned, -MIN_SINE), to=ir.DataType.FLOAT)
    back = op("Mul", op("Mul", odd, crossed), turn)
    moved = op("Add", turned, back)
    return op("Where", op("Less", sine, MIN_SINE), angle, moved)
