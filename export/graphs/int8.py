"""Quantisation of a graph's products and convolutions, for ONNX Runtime on CPUs or for TensorRT.

int8 (CPUs): only nodes with constant weights are quantised. Weights are quantised per output channel
and in seven bits: x86-64 without VNNI adds two products of an unsigned activation and a signed weight
in 16 bits, where 2 x 255 x 64 fits and eight bits of weight saturate. Activation ranges are dynamic
(of the image at hand; products only) or static (of example inputs). ONNX Runtime fuses convolutions
of static ranges to integer operators when it loads the graph.

int8-qdq (TensorRT): the products between quantize and dequantize nodes without zero points, in
an fp16 graph. Its ranges are static.

A node that loses too much accuracy, because a few very large activations pass through it, stays in
float.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graphs.fp16 import to_fp16
from export.graphs.product_errors import (
    PRODUCTS,
    Inputs,
    ProductError,
    product_errors,
    row_error,
    weight_axis,
)
from export.graphs.save import exceeds_protobuf, save
from train.progress import quiet

CONVOLUTION = "Conv"
ABSORBED = ("Clip", "Relu")  # activations that become the range of the convolution before them
# Largest relative error of a node. Normally distributed activations give 0.01; beside an activation
# a hundred times larger they give 0.2. Errors of a convolutional tower's many layers add up: of
# EfficientNet-Lite0, the first two convolutions have 0.034 and 0.045, the others at most 0.029.
MAX_ERROR = dict.fromkeys(PRODUCTS, 0.1) | {CONVOLUTION: 0.03}
LARGE_TABLE = 1 << 17  # elements
MAX_TABLE_ERROR = 0.02  # relative, of a row; normally distributed rows give 0.008
FEW_INPUTS = 64  # weights of convolutions with fewer inputs are few and sensitive
WEIGHT_BLOCK = 16  # inputs that share a scale, where activations stay in float
TINY = np.float32(1e-30)  # scale of rows of zeros
CONSTANT = {"MatMulConstBOnly": True}  # extra options of ONNX Runtime's quantisers
STATIC = {**CONSTANT, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)}


def to_int8(source: Path, target: Path, examples: Sequence[Inputs], *, static: bool) -> list[str]:
    """Write `source` in int8 for CPUs to `target`; return the nodes that stay in float.

    examples: inputs of the graph; static ranges come from all of them, each node's error from the
    first. static: also quantise convolutions.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    kinds = (*PRODUCTS, CONVOLUTION) if static else PRODUCTS
    errors = product_errors(source, examples[0], kinds)
    sensitive = _sensitive(errors)
    model = onnx.load(source)
    if static:
        _correct_biases(model.graph, {n: e for n, e in errors.items() if n not in sensitive})
    else:
        _fix_batch(model.graph)
    _shrink_tables(model.graph)
    options = _quantiser_options(model, sensitive, kinds) | {"reduce_range": True}
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        quantised = Path(folder) / target.name
        if static:
            options["op_types_to_quantize"] += ABSORBED
            options["activation_type"] = QuantType.QUInt8  # convolutions of QInt8 are not all fused
            reader = _CalibrationReader(examples)
            quantize_static(model, quantised, reader, extra_options=STATIC, **options)
        else:
            quantize_dynamic(model, quantised, extra_options=CONSTANT, **options)
        save(onnx_ir.load(quantised), target)
    return sensitive


def to_int8_weights(source: Path, target: Path) -> None:
    """Write `source` with the weights of products, convolutions and tables in int8; it computes in float.

    ONNX Runtime converts the weights to float when it loads. (A DequantizeLinear would make it round
    the activations to int8 too.)
    """
    model = onnx.load(source)
    graph = model.graph
    _shrink_tables(graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        name = node.input[1] if node.op_type in (*PRODUCTS, CONVOLUTION) else ""
        tensor = tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            continue
        if tensor.dims[1 - weight_axis(node)] >= FEW_INPUTS:
            nodes = _store_in_blocks(graph, tensor, 1 - weight_axis(node))
            for user in graph.node:
                user.input[:] = [nodes[-1].output[0] if x == name else x for x in user.input]
            for new in reversed(nodes):
                graph.node.insert(0, new)
    del graph.value_info[:]  # says float32 of the weights
    save(onnx_ir.from_proto(model), target)


def _store_in_blocks(
    graph: onnx.GraphProto, tensor: onnx.TensorProto, axis: int
) -> list[onnx.NodeProto]:
    """Store weights in int8; return the nodes that make them float again.

    Each block of up to WEIGHT_BLOCK inputs, along `axis`, of each output channel has a scale.
    """
    array, name = numpy_helper.to_array(tensor), tensor.name
    size = math.gcd(array.shape[axis], WEIGHT_BLOCK)
    values = array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])
    within = (axis + 1, *range(3, values.ndim))  # of a convolution also its places
    scales = np.maximum(np.abs(values).max(axis=within, keepdims=True), TINY) / 127
    stored = np.rint(values / scales).astype(np.int8)
    tensor.CopyFrom(numpy_helper.from_array(stored, name))
    shape = np.array(array.shape, np.int64)
    for value, suffix in ((scales, "scales"), (shape, "shape")):
        graph.initializer.append(numpy_helper.from_array(value, f"{name}.{suffix}"))
    return [
        helper.make_node("Cast", [name], [f"{name}.cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.cast", f"{name}.scales"], [f"{name}.blocks"]),
        helper.make_node("Reshape", [f"{name}.blocks", f"{name}.shape"], [f"{name}.float"]),
    ]


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


def _sensitive(errors: Mapping[str, ProductError]) -> list[str]:
    return [name for name, error in errors.items() if not error.relative <= MAX_ERROR[error.kind]]


def _quantiser_options(
    model: onnx.ModelProto, sensitive: list[str], kinds: Sequence[str] = PRODUCTS
) -> dict[str, Any]:
    """Return options to quantize nodes with constant weights, except the sensitive ones."""
    from onnxruntime.quantization import QuantType

    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in kinds]
    # Attention's products of two activations, which the static quantiser would take as well.
    without_weights = [node.name for node in products if node.input[1] not in weights]
    return {
        "op_types_to_quantize": list(kinds),
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


def _correct_biases(graph: onnx.GraphProto, errors: Mapping[str, ProductError]) -> None:
    """Subtract each convolution's mean error, by output channel, from its bias.

    Rounded weights move the mean of a channel, most of all where a convolution has few weights for
    each channel (Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.2).
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != CONVOLUTION or node.name not in errors:
            continue
        bias = -errors[node.name].shift
        for name in node.input[2:]:
            bias += numpy_helper.to_array(tensors[name])
            if sum(name in other.input for other in graph.node) == 1:
                graph.initializer.remove(tensors[name])
        node.input[2:] = [f"{node.name}.bias"]
        graph.initializer.append(numpy_helper.from_array(bias, node.input[2]))


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
        is_int8 = row_error(rounded * scales - array, array) <= MAX_TABLE_ERROR
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
