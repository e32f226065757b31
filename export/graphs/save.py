"""Saving of ONNX graphs, with large weights in a second file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeclip.onnx_file import locations

# Bytes of weights above which they are stored beside the graph: ONNX Runtime maps that file into
# memory instead of parsing and copying it, and a protobuf ends at 2 GiB.
SINGLE_FILE = 16 << 20
LARGEST_MESSAGE = 1_900_000_000  # bytes of weights that a protobuf takes


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph to `path`, and large weights to `path`.data."""
    if _weight_bytes(model) > SINGLE_FILE:
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
    else:
        onnx_ir.save(onnx_ir.external_data.load_to_model(model), path)


def exceeds_protobuf(model: onnx.ModelProto) -> bool:
    """Return whether the weights are too large for one protobuf."""
    return _weight_bytes(onnx_ir.from_proto(model)) > LARGEST_MESSAGE


def split_outputs(path: Path, targets: Mapping[str, Path]) -> None:
    """Replace a graph by one graph for each output, with the weights of all in PATH.data.

    targets: file of each output, in the folder of `path`.
    """
    weights = f"{path.name}.data"
    if weights not in locations(path):
        onnx_ir.save(onnx_ir.load(path), path, external_data=weights)
    models = {target: onnx_ir.load(path) for target in targets.values()}
    for output, target in targets.items():
        graph = models[target].graph
        remaining = [value for value in graph.outputs if value.name == output]
        graph.outputs.clear()
        graph.outputs.extend(remaining)
        RemoveUnusedNodesPass()(models[target])
        onnx_ir.save(models[target], target)


def _weight_bytes(model: onnx_ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
