"""Graphs of bundles as PyTorch modules: outputs as in ONNX Runtime, gradients as finite differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from edgeclip.bundle import Bundle
from tests.support.models.export_models import exported
from train.errors import ModelError
from train.robustness.bundle_source import bundle_source
from train.robustness.graph import Graph

FAMILIES = [
    "vit",
    "vit-avg",
    "vit-quickgelu",
    "coca",
    "resnet",
    "convnext",
    "efficientnet",
    "siglip",
]


def pixels_of(bundle: Bundle, count: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 3, *bundle.manifest.image.size)).astype(np.float32)


def run_onnx(path: Path, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: pixels})[0]


def check(path: Path, output: str, pixels: np.ndarray) -> None:
    expected = run_onnx(path, pixels)
    with torch.no_grad():
        actual = Graph(path, output)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_computes_what_onnx_runtime_computes(family: str) -> None:
    bundle = exported(family).bundle
    check(bundle.encoder("image_encoder", "fp32"), "embedding", pixels_of(bundle))
    if bundle.manifest.tokens is not None:
        check(bundle.encoder("image_tokens", "fp32"), "tokens", pixels_of(bundle))


@pytest.mark.parametrize(
    ("name", "precision"), [("everyday", "int8-weights"), ("garments", "fp32")]
)
def test_embedded_bundles_compute_what_onnx_runtime_computes(name: str, precision: str) -> None:
    bundle = Bundle(name)
    check(bundle.encoder("image_encoder", precision), "embedding", pixels_of(bundle, 1))


@pytest.mark.parametrize("family", ["vit", "siglip", "convnext", "efficientnet"])
def test_gradients_are_finite_differences_in_float64(family: str) -> None:
    bundle = exported(family).bundle
    graph = Graph(bundle.encoder("image_encoder", "fp32"), "embedding").double()
    pixels = torch.from_numpy(pixels_of(bundle, 1)).double().requires_grad_()
    weights = torch.linspace(-1, 1, bundle.manifest.embed_dim).double()
    (gradient,) = torch.autograd.grad((graph(pixels) * weights).sum(), pixels)
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = torch.randn(pixels.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            ends = [(graph(pixels + h * direction) * weights).sum() for h in (1e-6, -1e-6)]
        expected = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-6)


def test_text_and_images_of_a_bundle_alone_equal_its_checkpoint() -> None:
    export = exported("vit")
    source = bundle_source(export.bundle, "fp32")
    prompts = ["a dog.", "a very long way to say cat."]
    ids = [s.tokenizer(prompts) for s in (source, export.source)]
    pixels = torch.from_numpy(pixels_of(export.bundle))
    with torch.no_grad():
        for method, inputs in (("encode_text", ids), ("encode_image", [pixels, pixels])):
            actual, expected = (
                getattr(s.model, method)(x, normalize=True)
                for s, x in zip((source, export.source), inputs, strict=True)
            )
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(source.model.logit_scale, export.source.model.logit_scale.detach())


def test_a_graph_that_quantises_activations_is_refused() -> None:
    bundle = Bundle("garments")
    with pytest.raises(ModelError, match=r"no gradient here: .*Quantize.*--checkpoint"):
        Graph(bundle.encoder("image_encoder", "int8"), "embedding")


def write(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
    """Write a graph from x (2, 3, 8, 8) to embedding."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])
    result = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)
    arrays = [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "g", [value], [result], arrays)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def node(kind: str, *inputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), ["embedding"], **attributes)


I64 = np.int64
ONE = {
    "uneven pads": (
        node("Conv", "x", "w", pads=[0, 1, 1, 2], kernel_shape=[3, 3]),
        {"w": np.ones((2, 3, 3, 3), np.float32)},
    ),
    "groups": (
        node("Conv", "x", "w", "b", group=3, strides=[2, 2], dilations=[2, 1]),
        {"w": np.arange(18, dtype=np.float32).reshape(3, 1, 3, 2), "b": np.ones(3, np.float32)},
    ),
    "zero keeps a size": (node("Reshape", "x", "s"), {"s": np.array([0, -1], I64)}),
    "slice with steps": (
        node("Slice", "x", "b", "e", "a", "s"),
        {
            "b": np.array([-1, 1], I64),
            "e": np.array([-9, 2**62], I64),
            "a": np.array([3, 2], I64),
            "s": np.array([-3, 2], I64),
        },
    ),
    "gather from the end": (node("Gather", "x", "i", axis=2), {"i": np.array([[-1, 0]], I64)}),
    "gather a scalar": (node("Gather", "x", "i", axis=1), {"i": np.array(2, I64)}),
    "mean of all": (node("ReduceMean", "x", keepdims=0), {}),
    "norm": (node("ReduceL2", "x", "a"), {"a": np.array([1], I64)}),
    "max pool": (
        node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
        {},
    ),
    "average pool": (node("AveragePool", "x", kernel_shape=[2, 2], strides=[2, 2]), {}),
    "hard sigmoid": (node("HardSigmoid", "x", alpha=1 / 6, beta=0.5), {}),
    "one bound": (node("Clip", "x", "", "high"), {"high": np.array(0.5, np.float32)}),
    "tanh GELU": (node("Gelu", "x", approximate="tanh"), {}),
    "power": (node("Pow", "x", "two"), {"two": np.array(2.0, np.float32)}),
    "transpose all": (node("Transpose", "x"), {}),
    "unsqueeze": (node("Unsqueeze", "x", "a"), {"a": np.array([-1, 0], I64)}),
}


@pytest.mark.parametrize("case", ONE)
def test_operations_follow_onnx(case: str, tmp_path: Path) -> None:
    operation, constants = ONE[case]
    pixels = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    check(write(tmp_path / "g.onnx", [operation], constants), "embedding", pixels)


def test_weights_stored_in_int8_are_converted_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=0),
        node("Conv", "x", "w"),
    ]
    rng = np.random.default_rng(0)
    constants = {
        "q": rng.integers(-128, 128, (4, 3, 3, 3), np.int8),
        "scale": rng.uniform(0.01, 0.1, 4).astype(np.float32),
        "zero": np.array([0, 3, -5, 1], np.int8),
    }
    path = write(tmp_path / "g.onnx", nodes, constants)
    check(path, "embedding", rng.normal(size=(2, 3, 8, 8)).astype(np.float32))
    assert [buffer.shape for buffer in Graph(path, "embedding").buffers()] == [(4, 3, 3, 3)]


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be read as an ONNX graph"):
        Graph(tmp_path / "bad.onnx", "embedding")
    good = write(tmp_path / "good.onnx", [node("Relu", "x")], {})
    with pytest.raises(ModelError, match="no output tokens"):
        Graph(good, "tokens")
    auto = write(tmp_path / "auto.onnx", [node("Conv", "x", "w", auto_pad="SAME_UPPER")],
                 {"w": np.ones((2, 3, 3, 3), np.float32)})  # fmt: skip
    with pytest.raises(ModelError, match="auto_pad"):
        Graph(auto, "embedding")(torch.zeros(2, 3, 8, 8))
