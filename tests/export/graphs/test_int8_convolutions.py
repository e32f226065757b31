"""Convolutional image towers in int8, with static ranges, compared with their fp32 graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn

from edgeclip.precisions import PRECISIONS
from edgeclip.tools.pictures import picture
from export import ExportError
from export.bundle import export_bundle
from export.graphs import int8
from export.graphs.encoders import export_graph
from export.graphs.precisions import needs_images
from export.graphs.product_errors import product_errors
from tests.support.models.export_models import cached, exported, run_graph
from train.models.wording import wording

SIZE = 64


def pictures(count: int, seed: int) -> np.ndarray:
    """Return smooth random pixels (N, 3, SIZE, SIZE) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    base = np.asarray(picture(4 * SIZE, 4 * SIZE), np.float32) / 127.5 - 1
    corners = rng.integers(0, 3 * SIZE, (count, 2))
    crops = [base[y : y + SIZE, x : x + SIZE] for y, x in corners]
    return np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2))


@cached
def tower(folder: Path, name: str) -> tuple[Path, Path, list[str]]:
    """Return a tower's graph in fp32 and in int8, and the nodes that stay in float."""
    torch.manual_seed(0)
    settings = {"act_layer": nn.ReLU6} if name == "test_efficientnet" else {}
    model = timm.create_model(name, num_classes=0, **settings)
    source, target = folder / "fp32.onnx", folder / "int8.onnx"
    example, dims = (torch.zeros(2, 3, SIZE, SIZE),), ({0: torch.export.Dim("batch")},)
    export_graph(model, example, ["pixels"], ["embedding"], dims, source)
    batches = [{"pixels": pictures(8, seed)} for seed in range(2)]
    return source, target, int8.to_int8(source, target, batches, static=True)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_embeddings_are_nearly_the_fp32_ones_in_any_batch(name: str) -> None:
    source, target, _ = tower(name)
    pixels = pictures(3, 9)
    actual, expected = (run_graph(path, "embedding", pixels) for path in (target, source))
    lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (actual * expected).sum(axis=1) / lengths
    assert PRECISIONS["int8"].min_cosine <= cosines.min() < 1 - 1e-7
    alone = np.concatenate([run_graph(target, "embedding", row[None]) for row in pixels])
    np.testing.assert_allclose(alone, actual, atol=1e-2 * np.abs(actual).max())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_convolutions_have_seven_bits_and_a_scale_for_each_channel(name: str) -> None:
    _, target, sensitive = tower(name)
    graph = onnx.load(target).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    quantised = [node for node in convolutions if node.name not in sensitive]
    assert len(quantised) > len(convolutions) / 2
    for node in quantised:
        pixels, weight = (made_by[name] for name in node.input[:2])
        assert {pixels.op_type, weight.op_type} == {"DequantizeLinear"}
        values, scales = (arrays[name] for name in weight.input[:2])
        assert values.dtype == np.int8
        # Two products fit into 16 bits. The last convolutions of a new ResNet's blocks are zero.
        assert np.abs(values.astype(int)).max() in (0, 64)
        assert scales.shape == (len(values),)
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_the_file_is_deterministic(tmp_path: Path) -> None:
    source, target, _ = tower("test_efficientnet")
    batches = [{"pixels": pictures(8, seed)} for seed in range(2)]
    int8.to_int8(source, tmp_path / "again.onnx", batches, static=True)
    assert (tmp_path / "again.onnx").read_bytes() == target.read_bytes()


def test_a_convolutions_error_is_pytorchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
    x = torch.randn(4, 6, 9, 9)
    dims = ({0: torch.export.Dim("batch")},)
    export_graph(layer, (x,), ["x"], ["y"], dims, tmp_path / "conv.onnx")
    errors = product_errors(tmp_path / "conv.onnx", {"x": x.numpy()}, ["Conv"])
    (error,) = errors.values()
    weight = layer.weight.detach()
    steps = weight.abs().amax((1, 2, 3), keepdim=True) / 64
    step = (x.max() - x.min()) / 255
    rounded = [step * (x / step).round(), steps * (weight / steps).round()]
    exact, actual = (
        nn.functional.conv2d(*inputs, stride=2, padding=1, groups=2)
        for inputs in ((x, weight), rounded)
    )
    np.testing.assert_allclose(error.shift, (actual - exact).mean((0, 2, 3)), atol=1e-5)
    assert error.relative == pytest.approx(float((actual - exact).norm() / exact.norm()), rel=1e-3)


def test_a_convolutional_tower_without_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.bundle._write_encoders", pytest.fail)
    source = exported("resnet").source
    assert not needs_images("int8", exported("vit").source)
    assert not needs_images("fp16", source)
    with pytest.raises(ExportError, match="int8 takes its ranges from images: name a data set"):
        export_bundle(source, tmp_path / "bundle", wording(source), precisions=["int8"])
