"""The encoders in int8 for CPUs, and in fp16 and int8-qdq for GPUs, from their fp32 files.

int8: products with constant weights, by ONNX Runtime's quantiser; weights per column and in seven bits,
everything else in float. Without VNNI, x86-64 adds two products of an unsigned activation and a signed
weight in 16 bits: 2 x 255 x 64 fits, and eight bits of weight saturate. The image encoder takes the range of its activations from each image (dynamic), since no
pictures are at hand that stand for all; the text encoder from prompts (static), so that a prompt's
embedding does not depend on those beside it. A product that loses too much, as those do that a few
very large activations pass through, stays in float. fp16: weights and most operations; layer norms,
softmax, inputs and outputs stay in float, without which some models are lost (NVIDIA/TensorRT#2709).
int8-qdq: the image encoder in fp16, with the same products in int8 by quantize and dequantize nodes
without zero points, as TensorRT reads them. It takes ranges from no image when it runs: they are those
of a data set (static), and one for all images. Its text encoder is the fp32 one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeclip.backends.onnx_runtime import open_session
from export.graphs.fp16 import to_fp16
from export.graphs.save import LARGEST_MESSAGE, save_model, weight_bytes
from train.progress import quiet

PRODUCTS = ("MatMul", "Gemm")
# Of a row (a token), relative to what the product gives; root mean square over the rows. Activations
# of a normal distribution lose 0.01, and those beside one that is a hundred times larger 0.2.
MAX_LAYER_ERROR = 0.1
CPU_WEIGHT_LEVELS, GPU_WEIGHT_LEVELS = 64, 127  # the largest integer of a weight
WORDS = 250  # in the prompts that static ranges are taken from
PICTURES, PART = 128, 16  # images that static ranges are taken from, and how many at a time
ROWS = 1024  # of activations, to measure a product by
LARGE_TABLE = 1 << 20  # elements
CONSTANT = {"MatMulConstBOnly": True}  # extra options of ONNX Runtime's quantisers
STATIC = {**CONSTANT, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)}

Inputs = Mapping[str, NDArray[Any]]
Weights = Mapping[str, NDArray[Any]]


def to_qdq(source: Path, target: Path, examples: Sequence[Inputs]) -> list[str]:
    """Write `source` in fp16 with products in int8 for TensorRT to `target`; see `to_int8`.

    TensorRT demands that zero points are 0, and that an int8 product is told by the nodes around it.
    """
    from onnxruntime.quantization import QuantType, quantize_static

    sensitive = _sensitive(product_errors(source, examples[0], for_gpu=True))
    model = onnx.load(source)
    extra = STATIC | {"ActivationSymmetric": True, "WeightSymmetric": True}
    options = _options(model, sensitive)
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        quantize_static(
            model,
            made,
            _Examples(examples),
            activation_type=QuantType.QInt8,
            extra_options=extra,
            **options,
        )
        # In this order: of fp16 weights the quantiser loses each column whose step is below fp16's
        # smallest normal number, where its subnormal ones do.
        to_fp16(made, target)
    return sensitive


def to_int8(source: Path, target: Path, examples: Sequence[Inputs], *, static: bool) -> list[str]:
    """Write `source` in int8 to `target`; returns the names of the products that stay in float.

    examples: inputs of the graph, from which static ranges are taken, and by the first of which the
    loss of each product is measured.
    """
    from onnxruntime.quantization import quantize_dynamic, quantize_static

    sensitive = _sensitive(product_errors(source, examples[0]))
    model = onnx.load(source)
    if not static:
        _fix_batch(model.graph)
    _halve_tables(model.graph)
    options = _options(model, sensitive) | {"reduce_range": True}
    with quiet(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        if static:
            quantize_static(model, made, _Examples(examples), extra_options=STATIC, **options)
        else:
            quantize_dynamic(model, made, extra_options=CONSTANT, **options)
        save_model(onnx.load(made), target)
    return sensitive


def _sensitive(errors: Mapping[str, float]) -> list[str]:
    return [name for name, error in errors.items() if not error <= MAX_LAYER_ERROR]


def _options(model: onnx.ModelProto, sensitive: list[str]) -> dict[str, Any]:
    """Of ONNX Runtime's quantisers: products with constant weights, but for the sensitive ones."""
    from onnxruntime.quantization import QuantType

    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        "op_types_to_quantize": list(PRODUCTS),
        "nodes_to_exclude": sensitive + _without_weights(model.graph, weights),
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": weight_bytes(model) > LARGEST_MESSAGE,
    }


class _Examples:
    """What ONNX Runtime's calibration reads from."""

    def __init__(self, examples: Sequence[Inputs]) -> None:
        self._rest = iter(examples)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        found = next(self._rest, None)
        return None if found is None else dict(found)


def product_errors(source: Path, example: Inputs, *, for_gpu: bool = False) -> dict[str, float]:
    """Return, by node, how much of each product with constant weights int8 loses on `example`: the
    error of a row relative to its length, root mean square over the rows.

    for_gpu: weights in eight bits, and activations in steps that go as far below 0 as above.
    """
    model = onnx.load(source)
    # Before the graph is saved, which moves its weights to a file.
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in PRODUCTS and n.input[1] in weights]
    del model.graph.output[:]
    for name in dict.fromkeys(node.input[0] for node in nodes):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.name
        save_model(model, path)
        session = open_session(path, "cpu")
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, dict(example)), strict=True))
    return {node.name: _error(node, found[node.input[0]], weights, for_gpu) for node in nodes}


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
    steps = np.abs(weight).max(axis=0) / levels  # of each column
    x = x[:: -(-len(x) // ROWS)]
    rounded = step * np.rint(x / step) if step else x
    columns = steps * np.rint(weight / np.where(steps > 0, steps, 1))
    exact = np.asarray(x @ weight, np.float64)
    size, lost = np.square(exact).sum(axis=1), np.square(rounded @ columns - exact).sum(axis=1)
    used = size > 0
    return float(np.sqrt((lost[used] / size[used]).mean())) if used.any() else 0.0


def _without_weights(graph: onnx.GraphProto, weights: set[str]) -> list[str]:
    """Products of two activations, of attention, which the static quantiser would take as well."""
    return [n.name for n in graph.node if n.op_type in PRODUCTS and n.input[1] not in weights]


def _fix_batch(graph: onnx.GraphProto) -> None:
    """Take one input at a time: the range of a batch would make each answer depend on the others."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def _halve_tables(graph: onnx.GraphProto) -> None:
    """Keep large tables that rows are taken from, as token embeddings, in fp16: half of a text
    encoder's size, for an error far below that of int8 in any product."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != TensorProto.FLOAT:
            continue
        array = numpy_helper.to_array(table)
        if array.size < LARGE_TABLE or sum(table.name in n.input for n in graph.node) > 1:
            continue
        table.CopyFrom(numpy_helper.from_array(array.astype(np.float16), table.name))
        for value in [v for v in graph.value_info if v.name == table.name]:  # says float32
            graph.value_info.remove(value)
        rows, node.output[0] = node.output[0], f"{node.output[0]}.fp16"
        cast = helper.make_node("Cast", [node.output[0]], [rows], to=TensorProto.FLOAT)
        graph.node.insert(list(graph.node).index(node) + 1, cast)
