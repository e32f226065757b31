"""Image encoders in int8-qdq for TensorRT: nodes, results, and use on request only."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

import edgeclip
from edgeclip.backends.base import unit
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.backends.select import preferred
from edgeclip.bundle import Bundle
from edgeclip.manifest import Variant
from edgeclip.tools import golden
from export import ExportError
from export.__main__ import main
from export.bundle import export_bundle
from export.checks import fidelity
from export.graphs import int8, precisions
from tests.support.models.export_models import (
    cached,
    exported,
    folder_of_images,
    product,
    reuse_encoders,
    run_graph,
)
from tests.support.paths import EXAMPLES, GARMENTS, VECTORS
from train.models.wording import wording

Array = NDArray[Any]
FP32 = GARMENTS / "image_encoder.fp32.onnx"


@cached
def encoder(folder: Path) -> Path:
    """Convert the image encoder of garments, with ranges of 64 Fashion-MNIST images."""
    with np.load(VECTORS / "fashion_200.npz") as arrays:
        images = list(np.repeat(arrays["images"][:64, ..., None], 3, axis=3))
    pixels = edgeclip.Runtime("garments", device="cpu", purify="none").preprocess(images)
    path = folder / "image_encoder.int8-qdq.onnx"
    int8.to_qdq(FP32, path, [{"pixels": pixels[i : i + 16]} for i in range(0, 64, 16)])
    return path


def test_tensorrt_can_read_every_quantised_product() -> None:
    graph = onnx.load(encoder()).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    quantised = 0
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = (numpy_helper.to_array(weights[name]) for name in node.input[1:])
            assert zero.dtype == np.int8
            assert not zero.any()
            assert scale.dtype == np.float16
            assert scale > 0
        if node.op_type != "MatMul":
            continue
        sources = [made_by.get(name) for name in node.input]
        dequantised = [s is not None and s.op_type == "DequantizeLinear" for s in sources]
        assert dequantised in ([True, True], [False, False])  # both sides or none
        if not all(dequantised):
            assert not set(node.input) & weights.keys()  # a product of two activations
            continue
        quantised += 1
        activation, weight = sources
        assert made_by[activation.input[0]].op_type == "QuantizeLinear"
        rows = numpy_helper.to_array(weights[weight.input[0]])
        scales = numpy_helper.to_array(weights[weight.input[1]])
        assert rows.dtype == np.int8
        assert [attribute.i for attribute in weight.attribute if attribute.name == "axis"] == [1]
        assert scales.shape == (rows.shape[1],)
        assert not numpy_helper.to_array(weights[weight.input[2]]).any()
    assert quantised == 17  # four in each of four blocks, and the projection
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param  # a batch of any size
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert set(kinds.values()) == {TensorProto.FLOAT}


def test_embeddings_are_nearly_the_fp32_ones_in_any_batch(fashion: tuple[Array, Array]) -> None:
    pixels = edgeclip.Runtime("garments", device="cpu", purify="none").preprocess(
        list(fashion[0][100:])
    )
    run = OnnxEncoder(encoder(), device="cpu")
    actual, expected = unit(run.embed(pixels)), unit(OnnxEncoder(FP32, device="cpu").embed(pixels))
    cosines = (actual * expected).sum(axis=1)
    assert 0.999 < cosines.min() < 1 - 1e-6  # it is not the fp32 encoder
    alone = np.concatenate([unit(run.embed(row[None])) for row in pixels[:5]])
    np.testing.assert_allclose(alone, actual[:5], atol=1e-3)  # fp16 rounding depends on the batch
    weights = FP32.with_name(f"{FP32.name}.data")
    assert encoder().stat().st_size < 0.35 * weights.stat().st_size


@pytest.mark.parametrize("gemm", [False, True])
def test_a_product_equals_numpys(tmp_path: Path, gemm: bool) -> None:
    rng = np.random.default_rng(0)
    weight, calm = (
        rng.standard_normal((64, 32), np.float32),
        rng.standard_normal((50, 64), np.float32),
    )
    weight[:, 3] *= 1e-4  # a step below fp16's normal numbers
    source, target = product(tmp_path / "fp32.onnx", weight, gemm=gemm), tmp_path / "qdq.onnx"
    assert int8.to_qdq(source, target, [{"x": calm[:25]}, {"x": calm[25:]}]) == []
    inputs = rng.standard_normal((9, 64), np.float32)
    inputs[0, 0] = 20  # outside the range, and clipped
    step = np.abs(calm).max() / 127
    steps = np.abs(weight).max(axis=0) / 127
    clipped = step * np.clip(np.rint(inputs / step), -128, 127)
    expected = clipped @ (steps * np.rint(weight / steps))
    actual = run_graph(target, "y", inputs)
    np.testing.assert_allclose(actual, expected, atol=0.02 * np.abs(expected).max())
    np.testing.assert_allclose(
        actual[:, 3], expected[:, 3], atol=0.05 * np.abs(expected[:, 3]).max()
    )
    spiked = calm.copy()
    spiked[7, 3] = 1000
    assert int8.to_qdq(source, target, [{"x": spiked}]) == ["product"]
    actual = run_graph(target, "y", inputs)
    np.testing.assert_allclose(actual, inputs @ weight, atol=2e-3 * np.abs(expected).max())


def test_calibration_images_come_from_a_whole_data_set(tmp_path: Path) -> None:
    data = fidelity.load(f"folder:{folder_of_images(tmp_path)}")
    runtime = edgeclip.Runtime("garments", device="cpu", purify="none")
    batches = precisions.calibration_images(data, runtime.bundle.manifest.image)
    actual = np.concatenate([batch["pixels"] for batch in batches])
    expected = runtime.preprocess([data[i][0] for i in range(len(data))])
    np.testing.assert_array_equal(actual, expected)
    assert len(actual) == 8


def test_it_is_exported_with_the_fp32_text_encoder_and_never_chosen_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    reuse_encoders(monkeypatch, tiny)
    data = fidelity.load(f"folder:{folder_of_images(tmp_path / 'set')}")
    words = wording(tiny.source)
    out, alone = tmp_path / "both", tmp_path / "alone"
    manifest = export_bundle(tiny.source, out, words, precisions=["fp32", "int8-qdq"], data=data)
    qdq = manifest.precisions["int8-qdq"]
    assert (qdq.image_encoder, qdq.text_encoder) == (
        "image_encoder.int8-qdq.onnx",
        "text_encoder.fp32.onnx",
    )
    assert qdq.parity["image_min_cosine"] >= 0.99
    assert qdq.parity["top1_agreement"] >= 0.99
    for device in ("cpu", "cuda", "tensorrt"):  # although its answers were verified
        assert preferred(Bundle(out), device) == ["fp32"]
    runtime = edgeclip.Runtime(out, device="cpu", precision="int8-qdq")
    assert golden.check(runtime)["image"] > 0

    export_bundle(tiny.source, alone, words, precisions=["int8-qdq"], data=data)
    assert sorted(path.name for path in alone.glob("*.onnx")) == [
        "image_encoder.int8-qdq.onnx",
        "image_tokens.int8-qdq.onnx",
        "text_encoder.fp32.onnx",
    ]
    only = edgeclip.Runtime(alone, device="cpu", labels=["a", "b"])
    assert only.precision == "int8-qdq"  # the only precision


def test_without_images_it_is_refused_before_minutes_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = exported("vit")
    monkeypatch.setattr("export.bundle._write_encoders", pytest.fail)
    with pytest.raises(ExportError, match="name a data set with --data"):
        export_bundle(tiny.source, tmp_path / "b", wording(tiny.source), precisions=["int8-qdq"])
    command = [str(tiny.folder), "-o", str(tmp_path / "b"), "--precision", "int8-qdq"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "error: int8-qdq takes its ranges from images: name a data set with --data"
    assert not list(tmp_path.iterdir())


def test_tensorrt_builds_an_engine_of_it(tmp_path: Path) -> None:
    """Build strongly typed engines of the encoder and the fused graph, without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    from export.to_tensorrt import main as compile_for

    folder = tmp_path / "bundle"
    shutil.copytree(GARMENTS, folder)
    shutil.copy(encoder(), folder)
    manifest = Bundle(folder).manifest
    qdq = Variant(encoder().name, "text_encoder.fp32.onnx", "image_tokens.fp32.onnx")
    Bundle.write_manifest(
        folder, dataclasses.replace(manifest, precisions={**manifest.precisions, "int8-qdq": qdq})
    )
    from export.fused import main as fuse

    labels = ["--labels", str(EXAMPLES / "labels.txt")]
    fused = folder / "fused.int8-qdq.onnx"
    assert fuse([str(folder), "-o", str(fused), "--precision", "int8-qdq", *labels]) == 0
    Bundle.write_manifest(folder, Bundle(folder).manifest)
    assert compile_for([str(folder), "--precision", "int8-qdq", "--capability", "86"]) == 0
