"""ONNX files as a bundle has them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir

# Bytes of weights from which these lie beside the graph, where ONNX Runtime maps them into memory
# rather than parse and copy them; a protobuf would end at 2 GiB.
SINGLE_FILE = 16 << 20


def save(model: onnx_ir.Model, path: Path) -> None:
    """Write the graph and its weights: one file, or FILE and FILE.data where they are too large."""
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if weights > SINGLE_FILE:
        onnx_ir.save(model, path, external_data=f"{path.name}.data")
    else:
        onnx_ir.save(onnx_ir.external_data.load_to_model(model), path)
