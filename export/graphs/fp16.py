"""Conversion of a graph to float16.

Weights and most operations become float16. Layer norms, softmax, inputs and outputs stay float32,
without which some models lose their accuracy (NVIDIA/TensorRT#2709).
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir

from export.graphs.save import exceeds_protobuf, save
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
            disable_shape_infer=exceeds_protobuf(model),  # the shapes are then the exporter's
        )
    _remove_duplicate_casts(model.graph)
    del model.graph.value_info[:]  # some entries still say float32
    converted = onnx_ir.from_proto(model)
    converted.graph.sort()  # the converter puts casts of inputs behind their consumers
    save(converted, target)


def _remove_duplicate_casts(graph: onnx.GraphProto) -> None:
    """Remove repeated casts: one weight of two float operations is cast twice, to the same name."""
    computed: set[str] = set()
    for node in list(graph.node):
        if computed.issuperset(node.output):
            graph.node.remove(node)
        computed.update(node.output)
