"""Errors of a graph's products and convolutions in int8, measured on example inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.backends.onnx_runtime import open_session
from export.graphs.save import save

PRODUCTS = ("MatMul", "Gemm")
CPU_WEIGHT_LEVELS, GPU_WEIGHT_LEVELS = 64, 127  # largest integer of a weight
ERROR_ROWS = 1024  # rows of activations that the error of a product is measured on

Array = NDArray[Any]
Inputs = Mapping[str, Array]


class ProductError(NamedTuple):
    """Error of one product in int8.

    relative: a row's error relative to its length, root mean square over the rows (tokens); a
    convolution's rows are the places of its output, and weigh as much as their length.
    """

    kind: str  # operator
    relative: float
    shift: NDArray[np.float32]  # mean error of each output channel


def product_errors(
    source: Path, example: Inputs, kinds: Sequence[str] = PRODUCTS, *, for_gpu: bool = False
) -> dict[str, ProductError]:
    """Return the error on `example` of each node with constant weights, by node name.

    kinds: operators to measure. for_gpu: weights have eight bits, and activation ranges are
    symmetric about 0.
    """
    model = onnx.load(source)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in kinds and n.input[1] in weights]
    del model.graph.output[:]
    for name in dict.fromkeys(node.input[0] for node in nodes):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.name
        save(onnx_ir.from_proto(model), path)
        session = open_session(path, "cpu")
        names = [output.name for output in session.get_outputs()]
        activations = dict(zip(names, session.run(names, dict(example)), strict=True))
    return {
        node.name: _error(node, activations[node.input[0]], weights[node.input[1]], for_gpu)
        for node in nodes
    }


def weight_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a weight that holds the output channels."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def _error(node: onnx.NodeProto, x: Array, weight: Array, for_gpu: bool) -> ProductError:
    is_product = node.op_type in PRODUCTS
    if is_product:
        x = x.reshape(-1, x.shape[-1])
        x = x[:: -(-len(x) // ERROR_ROWS)]
    width = 2 * np.abs(x).max() if for_gpu else max(x.max(), 0) - min(x.min(), 0)
    step = np.float32(width / (254 if for_gpu else 255))
    levels = GPU_WEIGHT_LEVELS if for_gpu else CPU_WEIGHT_LEVELS
    axes = tuple(axis for axis in range(weight.ndim) if axis != weight_axis(node))
    steps = np.abs(weight).max(axis=axes, keepdims=True) / np.float32(levels)
    rounded = step * np.rint(x / step) if step else x
    rounded_weight = steps * np.rint(weight / np.where(steps > 0, steps, 1))
    exact = _rows(node, x, weight)
    error = _rows(node, rounded, rounded_weight) - exact
    shift = error.mean(axis=0, dtype=np.float64).astype(np.float32)
    return ProductError(node.op_type, row_error(error, exact, equally=is_product), shift)


def row_error(error: Array, exact: Array, *, equally: bool = True) -> float:
    """Return the root mean square over rows (N, D) of the error relative to the row's length.

    equally: rows weigh the same, otherwise as much as their length. Flat parts of a picture give rows
    of almost nothing.
    """
    squared_error, squared_norm = (
        np.square(a).sum(axis=1, dtype=np.float64) for a in (error, exact)
    )
    nonzero = squared_norm > 0
    if not nonzero.any():
        return 0.0
    if equally:
        return float(np.sqrt((squared_error[nonzero] / squared_norm[nonzero]).mean()))
    return float(np.sqrt(squared_error.sum() / squared_norm.sum()))


def _rows(node: onnx.NodeProto, x: Array, weight: Array) -> NDArray[np.float32]:
    """Return the node's output without bias, (rows, output channels)."""
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    alone.input[:], alone.output[:] = ["x", "weight"], ["y"]
    inputs = {"x": x, "weight": weight}
    infos = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in inputs.items()
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([alone], "product", infos, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "product.onnx")
        (y,) = open_session(Path(folder) / "product.onnx", "cpu").run(None, inputs)
    rows: NDArray[np.float32] = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
    return rows
