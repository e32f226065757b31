"""Conversion of a graph to float16."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir

from export.graphs.save import LARGEST_MESSAGE, save_model, weight_bytes
from train.progress import quiet

FLOAT_OPERATIONS = ("LayerNormalization", "Softmax", "ReduceMean", "ReduceL2", "Pow", "Sqrt")


def to_fp16(source: Path, target: Path) -> None:
    """Write `source` with fp16 weights and fp32 inputs and outputs to `target`."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(source)
    with quiet():
        model = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT_OPERATIONS],
            disable_shape_infer=weight_bytes(model)
            > LARGEST_MESSAGE,  # the exporter's own shapes then
        )
    made: set[str] = set()  # a weight of two float operations is cast for both, by the same name
    for node in list(model.graph.node):
        if made.issuperset(node.output):
            model.graph.node.remove(node)
        made.update(node.output)
    del model.graph.value_info[:]  # of which some still say float32
    graph = onnx_ir.from_proto(model)
    graph.graph.sort()  # casts of inputs were put behind those that take them
    save_model(onnx_ir.to_proto(graph), target)
