"""Fused graphs, compared with the runtime and with NumPy in float64."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

import edgeclip
from edgeclip.manifest import ImageSpec
from edgeclip.purify import CosPurifier
from export.fused import write_fused
from export.graphs.fused import Head, fuse
from tests.support.models.export_models import exported
from tests.support.models.fused_graphs import (
    answers,
    halved,
    images_of,
    open_graph,
    random_labels,
    runtime_of,
    unit_rows,
)
from tests.support.models.schema1 import schema1_bundle
from tests.support.paths import EXAMPLES

Array = NDArray[Any]
PURIFIERS = (None, CosPurifier(), CosPurifier(1, 0.3), CosPurifier(3, 0.05), CosPurifier(7, 2.0))
SIZE, DIM = (2, 3), 18  # image size and embedding width of an encoder that returns its pixels
SCALE = 20.0


@pytest.mark.parametrize("purifier", PURIFIERS, ids=str)
@pytest.mark.parametrize("family", ["vit", "vit-avg", "siglip"])  # vit-avg is not square
def test_answers_are_the_runtimes(
    family: str, purifier: CosPurifier | None, tmp_path: Path
) -> None:
    tiny = exported(family).bundle
    runtime, path = runtime_of(tiny, purifier), tmp_path / "fused.onnx"
    assert write_fused(runtime, path, Head(purifier)) < 1e-5
    session = open_graph(path)
    for batch, count in itertools.product((1, 2, 33), (5, 1000)):
        labels = random_labels(runtime, count)
        images = images_of(tiny, batch)
        expected, indices = answers(runtime, images, labels, 5)
        actual = session.run(None, {"image": images, "classes": labels.embeddings})
        np.testing.assert_allclose(actual[0], expected, atol=1e-5)
        np.testing.assert_array_equal(actual[1], indices)
        assert (actual[0].dtype, actual[1].dtype) == (np.float32, np.int32)


def test_purification_changes_the_answers() -> None:
    """Verify that the comparisons above distinguish the purifiers."""
    tiny = exported("vit").bundle
    images = images_of(tiny, 3)
    scores = []
    for purifier in PURIFIERS:
        runtime = runtime_of(tiny, purifier)
        labels = random_labels(runtime, 50)
        scores.append(answers(runtime, images, labels, 5)[0])
    for (i, one), (j, other) in itertools.combinations(enumerate(scores), 2):
        if (i, j) != (0, 1):  # ten steps of size 30 are the identity
            assert np.abs(one - other).max() > 1e-3


def pixels_as_embeddings() -> ir.Model:
    """Return an encoder with a second output, and a weight that only this output uses."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["embedding"]),
            helper.make_node(
                "Add", ["embedding", "unused"], ["image"]
            ),  # a name that the fused graph also uses
            helper.make_node("Mul", ["image", "image"], ["tokens"]),
        ],
        "g",
        [info("pixels", TensorProto.FLOAT, ["batch", 3, *SIZE])],
        [info(name, TensorProto.FLOAT, ["batch", DIM]) for name in ("embedding", "tokens")],
        [onnx.numpy_helper.from_array(np.ones(DIM, np.float32), "unused")],
    )
    tiny = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(tiny)


def run_head(z: Array, null_text: Array, purifier: CosPurifier | None) -> Array:
    """Return probabilities (N, DIM), where the classes are the axes' unit vectors."""
    plain = ImageSpec(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    head = Head(purifier, top_k=None)
    model = fuse(pixels_as_embeddings(), plain, null_text, SCALE, "float32", head)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    inputs = {"image": (255 * z).reshape(-1, 3, *SIZE), "classes": np.eye(DIM, dtype=np.float32)}
    (actual,) = session.run(["probabilities"], inputs)
    return actual


def step_by_step(z: Array, null_text: Array, purifier: CosPurifier | None) -> Array:
    """Return the same in float64, by the published steps (arXiv 2502.18176) in all dimensions."""
    t = null_text.astype(np.float64) / np.linalg.norm(null_text.astype(np.float64))
    probabilities = []
    for row in (np.float32(255) * z / np.float32(255)).astype(np.float64):
        u = row / np.linalg.norm(row)
        for _ in range(purifier.steps if purifier else 0):
            across = t - (u @ t) * u
            if np.linalg.norm(across) < 1e-5:
                break
            w = across / np.linalg.norm(across)
            u = (u + purifier.step_size * w) / np.hypot(1, purifier.step_size)
            u /= np.linalg.norm(u)  # otherwise rounding errors grow with every step
        power = np.exp(SCALE * (u - u.max()))
        probabilities.append(power / power.sum())
    return np.array(probabilities)


def at_angle(t: Array, angle: float, seed: int = 0) -> NDArray[np.float32]:
    """Return a vector of norm 7 at this angle to t."""
    other = np.random.default_rng(seed).standard_normal(DIM)
    other -= (other @ t) / (t @ t) * t
    other /= np.linalg.norm(other)
    return (7 * (np.cos(angle) * t / np.linalg.norm(t) + np.sin(angle) * other)).astype(np.float32)


@pytest.mark.parametrize("size", [0.0, 1e-7, 0.01, 0.5, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10, 101])
def test_closed_form_is_every_step_of_the_loop(steps: int, size: float) -> None:
    t = unit_rows(1, DIM)[0]
    angles = (0.03, 0.4, 1.0, 1.3, 1.5, 1.6, 2.5, 3.1)
    z = np.stack([at_angle(t, angle, seed) for seed, angle in enumerate(angles)])
    purifier = CosPurifier(steps, size)
    actual, expected = (compute(z, t, purifier) for compute in (run_head, step_by_step))
    np.testing.assert_allclose(actual, expected, atol=5e-6)


@pytest.mark.parametrize("steps", [1, 2, 10, 11])
@pytest.mark.parametrize("size", [0.01, 30.0])
def test_nearly_parallel_to_the_null_text(steps: int, size: float) -> None:
    t = unit_rows(1, DIM)[0]
    purifier = CosPurifier(steps, size)
    for sine in (1e-2, 1e-3, 1e-4):
        for angle in (sine, np.pi - sine):
            z = at_angle(t, angle)[None]
            actual, expected = (compute(z, t, purifier) for compute in (run_head, step_by_step))
            # float32 errors of 1e-7 are relative to the embedding, not to its small part across.
            np.testing.assert_allclose(actual, expected, atol=1e-6 + 1e-6 / sine)
    still = np.stack([7 * t, -7 * t, at_angle(t, 1e-6), at_angle(t, np.pi - 1e-6)])
    np.testing.assert_allclose(
        run_head(still, t, purifier), step_by_step(still, t, None), atol=1e-6
    )


def test_exactly_orthogonal_and_without_a_direction() -> None:
    t = np.zeros(DIM, np.float32)
    t[3] = 1
    z = np.zeros((2, DIM), np.float32)
    z[:, 5] = 4, -1e-3
    for purifier in (None, CosPurifier(1, 1.0), CosPurifier(5, 0.1), CosPurifier()):
        expected = step_by_step(z, t, purifier)
        np.testing.assert_allclose(run_head(z, t, purifier), expected, atol=2e-6)
        # The runtime refuses a zero embedding; the graph must not answer either.
        assert np.isnan(run_head(np.zeros_like(z), t, purifier)).all()


def test_only_what_an_answer_needs_is_left(tmp_path: Path) -> None:
    plain = ImageSpec(SIZE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    tiny = ir.to_proto(fuse(pixels_as_embeddings(), plain, np.ones(DIM), 1.0, "uint8", Head()))
    assert "unused" not in {tensor.name for tensor in tiny.graph.initializer}
    # Likewise for a real encoder of schema 1, which has the output `tokens` as well.
    write_fused(runtime_of(schema1_bundle(), None), tmp_path / "f.onnx", Head())
    graph = onnx.load(tmp_path / "f.onnx").graph
    taken = {name for node in graph.node for name in node.input}
    taken |= {output.name for output in graph.output}
    assert all(taken & set(node.output) for node in graph.node)
    assert {tensor.name for tensor in graph.initializer} <= taken
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims == {
        "image": ["batch", 16, 16, 3],
        "classes": ["classes", 16],
        "probabilities": ["batch", 5],
        "indices": ["batch", 5],
    }


def test_labels_are_swapped_without_a_new_graph_or_built_in(tmp_path: Path) -> None:
    tiny = exported("vit").bundle
    purifier = CosPurifier(3, 0.2)
    runtime = runtime_of(tiny, purifier)
    write_fused(runtime, tmp_path / "open.onnx", Head(purifier, top_k=2))
    session, images = open_graph(tmp_path / "open.onnx"), images_of(tiny, 3)
    for names in (["a dog", "a cat"], ["x", "y", "z"], [f"thing {i}" for i in range(40)]):
        labels = runtime.labels(names)
        expected, indices = answers(runtime, images, labels, 2)
        actual = session.run(None, {"image": images, "classes": labels.embeddings})
        np.testing.assert_allclose(actual[0], expected, atol=1e-5)
        np.testing.assert_array_equal(actual[1], indices)

        write_fused(runtime, tmp_path / "baked.onnx", Head(purifier, 5, labels))
        baked = open_graph(tmp_path / "baked.onnx")
        probabilities, found_indices = baked.run(None, {"image": images})
        expected, indices = answers(runtime, images, labels, 5)  # or fewer, with fewer classes
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
        np.testing.assert_array_equal(found_indices, indices)
        assert json.loads(baked.get_modelmeta().custom_metadata_map["labels"]) == names
    with pytest.raises(Exception, match="TopK"):
        session.run(None, {"image": images, "classes": unit_rows(1, 48)})


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
def test_probabilities_of_all_classes_are_in_their_order(tmp_path: Path, input_type: str) -> None:
    tiny = exported("vit-avg").bundle
    runtime = runtime_of(tiny, None)
    for labels in (runtime.labels(["only"]), runtime.labels(["a", "b", "c"]), None):
        head = Head(top_k=None, labels=labels)
        write_fused(runtime, tmp_path / "f.onnx", head, input_type=input_type)
        session, images = open_graph(tmp_path / "f.onnx"), images_of(tiny, 2)
        known = labels or random_labels(runtime, 7)
        inputs = {"image": images}
        if input_type == "float32":
            inputs = {"image": images.transpose(0, 3, 1, 2).astype(np.float32)}
        if labels is None:
            inputs["classes"] = known.embeddings
        (actual,) = session.run(None, inputs)
        expected, indices = answers(runtime, images, known, len(known))
        np.testing.assert_allclose(np.take_along_axis(actual, indices, 1), expected, atol=1e-5)
        np.testing.assert_allclose(actual.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions(precision: str, tmp_path: Path, fashion: tuple[Array, Array]) -> None:
    purifier = CosPurifier(3, 0.1)
    runtime = runtime_of(halved(), purifier, precision)
    write_fused(runtime, tmp_path / "f.onnx", Head(purifier))
    session = open_graph(tmp_path / "f.onnx")
    batch = session.get_inputs()[0].shape[0]
    assert batch == (1 if precision == "int8" else "batch")  # int8 ranges are per image
    labels = runtime.labels(edgeclip.read_labels(EXAMPLES / "labels.txt"))
    for image in fashion[0][:20]:
        inputs = {"image": image[None], "classes": labels.embeddings}
        actual, expected = session.run(None, inputs), answers(runtime, image[None], labels, 5)
        np.testing.assert_allclose(actual[0], expected[0], atol=2e-3)
        assert actual[1][0, 0] == expected[1][0, 0]


def test_openvino_gives_the_runtimes_answers(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    tiny, purifier = exported("siglip").bundle, CosPurifier(3, 0.2)
    runtime = runtime_of(tiny, purifier)
    write_fused(runtime, tmp_path / "f.onnx", Head(purifier))
    precise = {"INFERENCE_PRECISION_HINT": "f32"}  # the default is bfloat16 on some CPUs
    compiled = openvino.Core().compile_model(tmp_path / "f.onnx", "CPU", precise)
    labels = random_labels(runtime, 30)
    for batch in (1, 4):
        images = images_of(tiny, batch)
        actual = compiled({"image": images, "classes": labels.embeddings})
        expected, indices = answers(runtime, images, labels, 5)
        np.testing.assert_allclose(actual["probabilities"], expected, atol=1e-5)
        np.testing.assert_array_equal(actual["indices"], indices)


@pytest.mark.parametrize(("precision", "input_type"), [("fp32", "float32"), ("fp16", "uint8")])
def test_tensorrt_builds_an_engine_of_it(tmp_path: Path, precision: str, input_type: str) -> None:
    """Build a strongly typed engine, without a GPU; its answers are not checked."""
    trt = pytest.importorskip("tensorrt_rtx")
    purifier, path = CosPurifier(3, 0.2), tmp_path / "f.onnx"
    runtime = runtime_of(halved(), purifier, precision)
    write_fused(runtime, path, Head(purifier), input_type=input_type)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    profile = builder.create_optimization_profile()
    size = (28, 28, 3) if input_type == "uint8" else (3, 28, 28)
    profile.set_shape("image", (1, *size), (4, *size), (8, *size))
    profile.set_shape("classes", (5, 128), (10, 128), (1000, 128))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    assert [(o.name, o.dtype, tuple(o.shape)) for o in outputs] == [
        ("probabilities", trt.DataType.FLOAT, (-1, 5)),
        ("indices", trt.DataType.INT32, (-1, 5)),
    ]
