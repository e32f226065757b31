"""Saving of ONNX graphs, with their weights beside them where they are large."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx import helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeclip.onnx_file import locations

# Bytes of weights from which these lie beside the graph, where ONNX Runtime maps them into memory
# rather than parse and copy them; a protobuf would end at 2 GiB.
SINGLE_FILE = 16 << 20
LARGEST_MESSAGE = 1_900_000_000  # bytes of weights that a protobuf takes


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph and its weights: one file, or FILE and FILE.data where they are too large."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if weights > SINGLE_FILE:
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
    else:
        onnx_ir.save(onnx_ir.external_data.load_to_model(model), path)


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
        kept = [value for value in graph.outputs if value.name == output]
        graph.outputs.clear()
        graph.outputs.extend(kept)
        RemoveUnusedNodesPass()(models[target])
        onnx_ir.save(models[target], target)


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """One file, or FILE and FILE.data where the weights are too large for one."""
    external = weight_bytes(model) > SINGLE_FILE
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")


def weight_bytes(model: onnx.ModelProto) -> int:
    """Return the size of the weights in bytes."""
    return sum(
        int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )
