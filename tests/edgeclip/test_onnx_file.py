"""An ONNX file without one of its outputs, against the onnx package's own extraction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from edgeclip import BundleError
from edgeclip.backends.onnx_runtime import OnnxEncoder, open_session
from edgeclip.onnx_file import without_output
from tests.support.export_models import exported


def graph_of(family: str) -> Path:
    return exported(family).bundle.encoder("image_encoder", "fp32")


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_only_what_the_other_outputs_need_is_left(family: str, tmp_path: Path) -> None:
    whole, alone = graph_of(family), tmp_path / "alone.onnx"
    onnx.utils.extract_model(str(whole), str(alone), ["pixels"], ["embedding"])
    found = onnx.load_from_string(without_output(whole, "tokens"))
    onnx.checker.check_model(found)
    assert [output.name for output in found.graph.output] == ["embedding"]
    nodes = [node.output[0] for node in found.graph.node]
    assert nodes == [node.output[0] for node in onnx.load(alone).graph.node]
    if family == "vit":  # the others make the embedding of all tokens
        assert len(nodes) < len(onnx.load(whole).graph.node)


def test_the_embedding_is_the_same_to_the_last_bit(rng: np.random.Generator) -> None:
    path = graph_of("vit")
    size = [
        side for side in ort.InferenceSession(str(path)).get_inputs()[0].shape if side != "batch"
    ]
    pixels = rng.standard_normal((3, *size)).astype(np.float32)
    encoder = OnnxEncoder(path, device="cpu")
    (embedding, tokens) = ort.InferenceSession(str(path)).run(None, {"pixels": pixels})
    np.testing.assert_array_equal(encoder.embed(pixels), embedding)
    np.testing.assert_array_equal(encoder.tokens(pixels), tokens)


def test_an_output_that_is_not_there_changes_nothing() -> None:
    path = graph_of("resnet")
    assert onnx.load_from_string(without_output(path, "tokens")) == onnx.load(path)


def test_weights_beside_the_graph_are_found(tmp_path: Path) -> None:
    path = tmp_path / "beside.onnx"
    onnx.save(
        onnx.load(graph_of("vit")), path, save_as_external_data=True, location=f"{path.name}.data"
    )
    session = open_session(path, "cpu", without="tokens")
    assert [output.name for output in session.get_outputs()] == ["embedding"]


def test_what_cannot_be_cut_is_an_error(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Not", ["x"], ["y"])], "body", [], [value])
    branch = helper.make_node("If", ["x"], ["z"], then_branch=body, else_branch=body)
    path = tmp_path / "branch.onnx"
    onnx.save(helper.make_model(helper.make_graph([branch], "graph", [value], [])), path)
    with pytest.raises(ValueError, match="graphs within its graph"):
        without_output(path, "tokens")
    path.write_bytes(b"\x3a\x7fno graph")
    with pytest.raises(BundleError, match="does not load on cpu"):
        open_session(path, "cpu", without="tokens")
