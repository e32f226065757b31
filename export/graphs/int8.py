"""Quantisation of a graph's products to int8, for ONNX Runtime on CPUs or for TensorRT.

int8 (CPUs): only products with constant weights are quantised. Weights are quantised per column and in
seven bits: x86-64 without VNNI adds two products of an unsigned activation and a signed weight in 16
bits, where 2 x 255 x 64 fits and eight bits of weight saturate. Activation ranges are dynamic (of the
image at hand) or static (of example inputs).

int8-qdq (TensorRT): the same products between quantize and dequantize nodes without zero points, in
an fp16 graph. Its ranges are static.

A product that loses too much accuracy, because a few very large activations pass through it, stays
in float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.backends.onnx_runtime import open_session
from export.graphs.fp16 import to_fp16
from export.graphs.save import exceeds_protobuf, save
from train.progress import quiet

PRODUCTS = ("MatMul", "Gemm")
# Root mean square over the rows (tokens) of each row's relative error. Normally distributed
# activations give 0.01; beside an activation a hundred times larger they give 0.2.
MAX_PRODUCT_ERROR = 0.1
CPU_WEIGHT_LEVELS, GPU_WEIGHT_LEVELS = 64, 127  # largest integer of a weight
ERROR_ROWS = 1024  # rows of activations that a product's error is measured on
LARGE_TABLE = 1 << 17  # elements
MAX_TABLE_ERROR = 0.02  # as MAX_PRODUCT_ERROR; normally distributed rows give 0.008
TINY = np.float32(1e-30)  # scale of rows of zeros
CONSTANT = {"MatMulConstBOnly": True}  # extra options of ONNX Runtime's quantisers
STATIC = {**CONSTANT, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)}

Inputs = Mapping[str, NDArray[Any]]
Weights = Mapping[str, NDArray[Any]]


def to_int8(source: Path, target: Path, examples: Sequence[Inputs], *, static: bool) -> list[str]:
    """Write `source` in int8 for CPUs to `target`; return the products that stay in float.

    examples: inputs of the graph; static ranges come from all of them, each product's error from
    the first.
    """
    from onnxruntime.quantization import quantize_dynamic, quantize_static

    sensitive = _sensitive(product_errors(source, examples[0]))
    model = onnx.load(source)
    if not static:
        _fix_batch(model.graph)
    _shrink_tables(model.graph)
    options = _quantiser_options(model, sensitive) | {"reduce_range": True}
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        quantised = Path(folder) / target.name
        if static:
            reader = _CalibrationReader(examples)
            quantize_static(model, quantised, reader, extra_options=STATIC, **options)
        else:
            quantize_dynamic(model, quantised, extra_options=CONSTANT, **options)
        save(onnx_ir.load(quantised), target)
    return sensitive


def to_qdq(source: Path, target: Path, examples: Sequence[Inputs]) -> list[str]:
    """Write `source` in fp16 with int8 products for TensorRT to `target`; see `to_int8`.

    TensorRT requires zero points of 0, and recognises an int8 product by the nodes around it.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    sensitive = _sensitive(product_errors(source, examples[0], for_gpu=True))
    model = onnx.load(source)
    options = _quantiser_options(model, sensitive) | {"activation_type": QuantType.QInt8}
    extra = STATIC | {"ActivationSymmetric": True, "WeightSymmetric": True}
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        quantised = Path(folder) / target.name
        reader = _CalibrationReader(examples)
        quantize_static(model, quantised, reader, extra_options=extra, **options)
        # Convert after quantising: of fp16 weights, the quantiser drops each column whose step is
        # below fp16's smallest normal number.
        to_fp16(quantised, target)
    return sensitive


def _sensitive(errors: Mapping[str, float]) -> list[str]:
    return [name for name, error in errors.items() if not error <= MAX_PRODUCT_ERROR]


def _quantiser_options(model: onnx.ModelProto, sensitive: list[str]) -> dict[str, Any]:
    """Return options to quantize products with constant weights, except the sensitive ones."""
    from onnxruntime.quantization import QuantType

    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    # Attention's products of two activations, which the static quantiser would take as well.
    without_weights = [node.name for node in products if node.input[1] not in weights]
    return {
        "op_types_to_quantize": list(PRODUCTS),
        "nodes_to_exclude": sensitive + without_weights,
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": exceeds_protobuf(model),
    }


class _CalibrationReader:
    """Data reader of ONNX Runtime's calibration."""

    def __init__(self, examples: Sequence[Inputs]) -> None:
        self._remaining = iter(examples)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        inputs = next(self._remaining, None)
        return None if inputs is None else dict(inputs)


def product_errors(source: Path, example: Inputs, *, for_gpu: bool = False) -> dict[str, float]:
    """Return each product's error in int8 on `example`, by node name.

    The error is a row's relative to its length, root mean square over the rows. for_gpu: weights
    have eight bits, and activation ranges are symmetric about 0.
    """
    model = onnx.load(source)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in PRODUCTS and n.input[1] in weights]
    del model.graph.output[:]
    for name in dict.fromkeys(node.input[0] for node in nodes):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.name
        save(onnx_ir.from_proto(model), path)
        session = open_session(path, "cpu")
        names = [output.name for output in session.get_outputs()]
        activations = dict(zip(names, session.run(names, dict(example)), strict=True))
    return {node.name: _error(node, activations[node.input[0]], weights, for_gpu) for node in nodes}


def _error(
    node: onnx.NodeProto, activations: NDArray[Any], weights: Weights, for_gpu: bool
) -> float:
    weight = weights[node.input[1]]
    if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        weight = weight.T
    x = activations.reshape(-1, weight.shape[0])
    width = 2 * np.abs(x).max() if for_gpu else max(x.max(), 0) - min(x.min(), 0)
    step = np.float32(width / (254 if for_gpu else 255))
    levels = GPU_WEIGHT_LEVELS if for_gpu else CPU_WEIGHT_LEVELS
    column_steps = np.abs(weight).max(axis=0) / levels
    x = x[:: -(-len(x) // ERROR_ROWS)]
    rounded = step * np.rint(x / step) if step else x
    columns = column_steps * np.rint(weight / np.where(column_steps > 0, column_steps, 1))
    return _row_error(rounded @ columns, x @ weight)


def _row_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the root mean square over the rows of each row's relative error."""
    exact = np.asarray(expected, np.float64)
    squared_error = np.square(actual - exact).sum(axis=1)
    squared_norm = np.square(exact).sum(axis=1)
    nonzero = squared_norm > 0
    if not nonzero.any():
        return 0.0
    return float(np.sqrt((squared_error[nonzero] / squared_norm[nonzero]).mean()))


def _fix_batch(graph: onnx.GraphProto) -> None:
    """Fix the batch size to 1: a dynamic range over a batch would mix its images' embeddings."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def _shrink_tables(graph: onnx.GraphProto) -> None:
    """Store large lookup tables, such as token embeddings, in int8 with a scale for each row.

    A table with too large an error is stored in fp16. The rows are converted after the lookup, so
    that ONNX Runtime cannot expand the table when it loads.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(table)
        if array.size < LARGE_TABLE or sum(table.name in n.input for n in graph.node) > 1:
            continue
        if array.ndim != 2 or any(x.name == "axis" and x.i for x in node.attribute):
            continue
        scales = np.maximum(np.abs(array).max(axis=1, keepdims=True), TINY) / 127
        rounded = np.rint(array / scales)
        is_int8 = _row_error(rounded * scales, array) <= MAX_TABLE_ERROR
        stored = rounded.astype(np.int8) if is_int8 else array.astype(np.float16)
        table.CopyFrom(numpy_helper.from_array(stored, table.name))
        for value in [v for v in graph.value_info if v.name == table.name]:  # says float32
            graph.value_info.remove(value)
        rows, node.output[0] = node.output[0], f"{node.output[0]}.stored"
        floats = f"{rows}.float" if is_int8 else rows
        added = [helper.make_node("Cast", [node.output[0]], [floats], to=TensorProto.FLOAT)]
        if is_int8:
            names = f"{table.name}.scales", f"{rows}.scales"
            graph.initializer.append(numpy_helper.from_array(scales, names[0]))
            added.append(helper.make_node("Gather", [names[0], node.input[1]], [names[1]]))
            added.append(helper.make_node("Mul", [floats, names[1]], [rows]))
        for new in reversed(added):
            graph.node.insert(list(graph.node).index(node) + 1, new)
