"""Differentiable PyTorch module of an ONNX graph, for white-box attacks on a file that ships.

Covers the float operations of exported image encoders (opset 13 and later). Weights stored in int8 are
converted once; a graph that quantises activations has no gradient, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from train.errors import ModelError

Inputs = Sequence[Any]  # Tensor, or None for an optional input that is left out
Attributes = Mapping[str, Any]
Operation = Callable[[Inputs, Attributes], Any]

DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}


class Graph(nn.Module):
    """Module of a graph with one input: tensor -> the output of a name.

    path: ONNX file. output: name of the output. Raises ModelError for a file that cannot be read and
    for operations without a gradient here.
    """

    def __init__(self, path: Path, output: str) -> None:
        super().__init__()
        try:
            graph = onnx.load(str(path)).graph
        except Exception as err:  # protobuf and onnx raise anything
            raise ModelError(f"{path} cannot be read as an ONNX graph") from err
        unknown = sorted({n.op_type for n in graph.node if n.domain or n.op_type not in OPERATIONS})
        if unknown:
            raise ModelError(
                f"{path} has no gradient here: {', '.join(unknown)}; attack a precision that computes "
                "in float, or the checkpoint (--checkpoint)"
            )
        constants = {x.name: _tensor(x) for x in graph.initializer}
        inputs = [x.name for x in graph.input if x.name not in constants]
        if len(inputs) != 1 or output not in {x.name for x in graph.output}:
            raise ModelError(f"{path} is no encoder: it has no single input, or no output {output}")
        self._input, self._output = inputs[0], output
        self._steps: list[tuple[Operation, list[str], list[str], Attributes]] = []
        for node in graph.node:
            step = (
                OPERATIONS[node.op_type],
                list(node.input),
                list(node.output),
                {x.name: onnx.helper.get_attribute_value(x) for x in node.attribute},
            )
            if all(name in constants or not name for name in node.input):
                constants |= _run(step, constants)
            else:
                self._steps.append(step)
        used = {name for step in self._steps for name in step[1]} & constants.keys()
        self._buffer_of = {name: f"constant_{i}" for i, name in enumerate(sorted(used))}
        for name, buffer in self._buffer_of.items():
            # Shapes and indices stay on the host.
            if constants[name].is_floating_point():
                self.register_buffer(buffer, constants[name])
            else:
                setattr(self, buffer, constants[name])

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {self._input: x}
        for name, buffer in self._buffer_of.items():
            values[name] = getattr(self, buffer)
        for step in self._steps:
            values |= _run(step, values)
        result: Tensor = values[self._output]
        return result


def _tensor(initializer: Any) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(initializer).copy())


def _run(
    step: tuple[Operation, list[str], list[str], Attributes], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the outputs of one node by name."""
    operation, inputs, outputs, attributes = step
    result = operation([values[name] if name else None for name in inputs], attributes)
    results = result if isinstance(result, (tuple, list)) else (result,)
    return dict(zip(outputs, results, strict=False))


def _optional(x: Inputs, index: int) -> Any:
    return x[index] if len(x) > index else None


def _ints(x: Tensor) -> list[int]:
    return [int(v) for v in x.flatten().tolist()]


def _conv(x: Inputs, a: Attributes) -> Tensor:
    dims = x[1].ndim - 2
    strides, dilations = a.get("strides", [1] * dims), a.get("dilations", [1] * dims)
    padded, padding = _pad(x[0], a, 0.0)
    function = {1: F.conv1d, 2: F.conv2d}[dims]
    bias = _optional(x, 2)
    return function(padded, x[1], bias, strides, padding, dilations, a.get("group", 1))


def _pad(x: Tensor, a: Attributes, value: float) -> tuple[Tensor, list[int]]:
    """Return the input with what an operation cannot pad itself, and the padding that is left to it."""
    dims = x.ndim - 2
    pads = list(a.get("pads", [0] * 2 * dims))
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ModelError("a graph with auto_pad has no gradient here: export it with explicit pads")
    first, last = pads[:dims], pads[dims:]
    if first == last:
        return x, first
    sides = [side for pair in reversed(list(zip(first, last, strict=True))) for side in pair]
    return F.pad(x, sides, value=value), [0] * dims


def _max_pool(x: Inputs, a: Attributes) -> Tensor:
    padded, padding = _pad(x[0], a, -math.inf)
    return F.max_pool2d(padded, a["kernel_shape"], a.get("strides", [1, 1]), padding)


def _average_pool(x: Inputs, a: Attributes) -> Tensor:
    padded, padding = _pad(x[0], a, 0.0)
    counted = bool(a.get("count_include_pad", 0))
    if not counted and any(a.get("pads", [])):
        raise ModelError("AveragePool without its padding has no gradient here")
    return F.avg_pool2d(padded, a["kernel_shape"], a.get("strides", [1, 1]), padding)


def _reshape(x: Inputs, a: Attributes) -> Tensor:
    shape = _ints(x[1])
    if not a.get("allowzero", 0):
        shape = [x[0].shape[i] if size == 0 else size for i, size in enumerate(shape)]
    result: Tensor = x[0].reshape(shape)
    return result


def _reduce(function: Callable[..., Tensor]) -> Operation:
    def reduce(x: Inputs, a: Attributes) -> Tensor:
        axes = _optional(x, 1)
        dims = _ints(axes) if axes is not None else list(a.get("axes", []))
        if not dims:
            if a.get("noop_with_empty_axes", 0):
                result: Tensor = x[0]
                return result
            dims = list(range(x[0].ndim))
        return function(x[0], dims, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _gemm(x: Inputs, a: Attributes) -> Tensor:
    left = x[0].T if a.get("transA", 0) else x[0]
    right = x[1].T if a.get("transB", 0) else x[1]
    product = a.get("alpha", 1.0) * (left @ right)
    bias = _optional(x, 2)
    result: Tensor = product if bias is None else product + a.get("beta", 1.0) * bias
    return result


def _gelu(x: Inputs, a: Attributes) -> Tensor:
    return F.gelu(x[0], approximate=a.get("approximate", b"none").decode())


def _layer_norm(x: Inputs, a: Attributes) -> Tensor:
    shape = x[0].shape[a.get("axis", -1) :]
    return F.layer_norm(x[0], shape, x[1], _optional(x, 2), a.get("epsilon", 1e-5))


def _batch_norm(x: Inputs, a: Attributes) -> Tensor:
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], eps=a.get("epsilon", 1e-5))


def _split(x: Inputs, a: Attributes) -> Sequence[Tensor]:
    axis, sizes = a.get("axis", 0), _optional(x, 1)
    parts = -(-x[0].shape[axis] // a["num_outputs"]) if sizes is None else _ints(sizes)
    result: Sequence[Tensor] = x[0].split(parts, axis)
    return result


def _slice(x: Inputs, _: Attributes) -> Tensor:
    starts, ends = _ints(x[1]), _ints(x[2])
    axes = _ints(x[3]) if _optional(x, 3) is not None else list(range(len(starts)))
    steps = _ints(x[4]) if _optional(x, 4) is not None else [1] * len(starts)
    result: Tensor = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = range(result.shape[axis])[start:end:step]
        index = torch.tensor(list(chosen), dtype=torch.int64, device=result.device)
        result = result.index_select(axis, index)
    return result


def _gather(x: Inputs, a: Attributes) -> Tensor:
    axis, index = a.get("axis", 0), x[1].to(x[0].device)
    index = torch.where(index < 0, index + x[0].shape[axis], index)
    chosen: Tensor = x[0].index_select(axis, index.flatten())
    shape = [*x[0].shape[:axis], *index.shape, *x[0].shape[axis:][1:]]
    return chosen.reshape(shape)


def _expand(x: Inputs, _: Attributes) -> Tensor:
    shape = np.broadcast_shapes(tuple(x[0].shape), tuple(_ints(x[1])))
    result: Tensor = x[0].expand(shape)
    return result


def _clip(x: Inputs, _: Attributes) -> Tensor:
    low, high = _optional(x, 1), _optional(x, 2)
    if low is None and high is None:
        result: Tensor = x[0]
        return result
    return torch.clamp(x[0], low, high)


def _shape(x: Inputs, a: Attributes) -> Tensor:
    return torch.tensor(x[0].shape[a.get("start", 0) : a.get("end")], dtype=torch.int64)


def _squeeze(x: Inputs, _: Attributes) -> Tensor:
    axes = _optional(x, 1)
    result: Tensor = x[0].squeeze() if axes is None else x[0].squeeze(tuple(_ints(axes)))
    return result


def _unsqueeze(x: Inputs, _: Attributes) -> Tensor:
    result, axes = x[0], _ints(x[1])
    rank = result.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        result = result.unsqueeze(axis)
    tensor: Tensor = result
    return tensor


def _constant(_: Inputs, a: Attributes) -> Tensor:
    if "value" in a:
        return _tensor(a["value"])
    (value,) = a.values()
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else None)


def _constant_of_shape(x: Inputs, a: Attributes) -> Tensor:
    value = _tensor(a["value"]) if "value" in a else torch.zeros(1)
    return value.expand(_ints(x[0]))


def _flatten(x: Inputs, a: Attributes) -> Tensor:
    axis = a.get("axis", 1)
    result: Tensor = x[0].reshape(math.prod(x[0].shape[:axis]), -1)
    return result


def _dequantize(x: Inputs, a: Attributes) -> Tensor:
    """Convert constant integers; x - zero point, times scale, with one of both per index of an axis."""
    values, scale, zero = x[0].to(x[1].dtype), x[1], _optional(x, 2)
    if scale.ndim:
        shape = [1] * values.ndim
        shape[a.get("axis", 1)] = -1
        scale = scale.reshape(shape)
        zero = None if zero is None else zero.reshape(shape)
    result: Tensor = (values if zero is None else values - zero.to(scale.dtype)) * scale
    return result


def _of_one(function: Callable[[Tensor], Tensor]) -> Operation:
    return lambda x, _: function(x[0])


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return lambda x, _: function(x[0], x[1])


OPERATIONS: dict[str, Operation] = {
    "Add": _of_two(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda x, a: x[0].to(DTYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda x, a: torch.cat(list(x), a["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "DequantizeLinear": _dequantize,
    "Div": lambda x, _: (
        x[0] / x[1] if x[0].is_floating_point() else x[0].div(x[1], rounding_mode="trunc")
    ),
    "Equal": _of_two(torch.eq),
    "Erf": _of_one(torch.erf),
    "Exp": _of_one(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x, _: x[0].mean((2, 3), keepdim=True),
    "HardSigmoid": lambda x, a: (a.get("alpha", 0.2) * x[0] + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _of_one(F.hardswish),
    "Identity": _of_one(lambda x: x),
    "LayerNormalization": _layer_norm,
    "MatMul": _of_two(torch.matmul),
    "MaxPool": _max_pool,
    "Mul": _of_two(torch.mul),
    "Neg": _of_one(torch.neg),
    "Pow": _of_two(torch.pow),
    "Range": lambda x, _: torch.arange(*(v.item() for v in x)),
    "Reciprocal": _of_one(torch.reciprocal),
    "ReduceL2": _reduce(lambda x, dims, keepdim: x.norm(dim=dims, keepdim=keepdim)),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _of_one(torch.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _of_one(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda x, a: x[0].softmax(a.get("axis", -1)),
    "Split": _split,
    "Sqrt": _of_one(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of_two(torch.sub),
    "Tanh": _of_one(torch.tanh),
    "Transpose": lambda x, a: x[0].permute(a.get("perm", list(range(x[0].ndim))[::-1])),
    "Unsqueeze": _unsqueeze,
    "Where": lambda x, _: torch.where(x[0], x[1], x[2]),
}
