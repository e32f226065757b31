"""External data of ONNX files, compared with files that the onnx package writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgeclip.onnx_file import locations


def test_weights_beside_a_graph_are_found(tmp_path: Path) -> None:
    weights = [numpy_helper.from_array(np.ones(1000, np.float32), f"w{i}") for i in range(3)]
    graph = helper.make_graph([], "g", [], [], weights)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph), path)
    assert locations(path) == set()
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="one.bin")
    assert locations(path) == {"one.bin"}
    onnx.save(
        helper.make_model(graph), path, save_as_external_data=True, all_tensors_to_one_file=False
    )
    assert locations(path) == {"w0", "w1", "w2"}


def external_tensor() -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location=1)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="inner.bin")
    return tensor


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph", "function", "sparse"])
def test_tensors_are_found_wherever_they_can_be(tmp_path: Path, place: str) -> None:
    tensor = external_tensor()
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = helper.make_graph([], "inner", [], [], [tensor])
    branch = helper.make_node("If", ["x"], ["y"], then_branch=inner)
    sparse = onnx.SparseTensorProto(values=tensor, dims=[1])
    function = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 20)])
    nodes = {"constant": [constant], "subgraph": [branch]}.get(place, [])
    graph = helper.make_graph(
        nodes,
        "g",
        [],
        [],
        [tensor] if place == "initializer" else [],
        sparse_initializer=[sparse] if place == "sparse" else [],
    )
    model = helper.make_model(graph, functions=[function] if place == "function" else [])
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert locations(tmp_path / "m.onnx") == {"inner.bin"}


@pytest.mark.parametrize("contents", [b"", b"\x3a\xff", b"\x3a\x05ab", b"\x3b", b"\x09\x00"])
def test_a_file_that_is_no_protobuf_is_an_error(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(contents)
    with pytest.raises(ValueError, match=r"is|end"):
        locations(tmp_path / "m.onnx")
