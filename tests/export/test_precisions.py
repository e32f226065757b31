"""int8 and fp16 encoders of every family, against open_clip; and what has to stay in float."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import edgeclip
from edgeclip.backends.select import preferred
from edgeclip.bundle import Bundle
from edgeclip.tools import golden
from export import ExportError
from export.bundle import _write_precisions, export_bundle
from export.checks import fidelity, parity
from export.graphs import int8
from tests.support.export_models import (
    exported,
    folder_of_images,
    made_once,
    product,
    reuse_encoders,
    run_graph,
)
from train.models.wording import Wording

FAMILIES = ["vit", "vit-quickgelu", "resnet", "siglip"]  # the others add no kind of node
PROMPTS = ["a dog", "a café", "two small red things beside a much larger blue one"]


@made_once
def quantized(folder: Path, family: str) -> Bundle:
    """All three precisions of a tiny model."""
    made = exported(family)
    shutil.copytree(made.bundle.path, folder, dirs_exist_ok=True)
    source, manifest = made.source, made.bundle.manifest
    manifest = _write_precisions(folder, source, manifest, ["fp32", "fp16", "int8"])
    Bundle.write_manifest(folder, manifest)
    return Bundle(folder)


def cosines(found: NDArray[np.float32], wanted: torch.Tensor) -> NDArray[np.float64]:
    a, b = found.astype(np.float64), wanted.numpy().astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_nearly_open_clips(family: str, precision: str) -> None:
    made, bundle = exported(family), quantized(family)
    size = bundle.manifest.image.size
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(5))
    runtime = edgeclip.Runtime(bundle, device="cpu", precision=precision)
    ids = made.source.tokenizer(PROMPTS)
    with torch.no_grad():
        images, texts = made.source.model.encode_image(pixels), made.source.model.encode_text(ids)
    bar = parity.MIN_COSINE[precision]
    assert cosines(runtime.encode(pixels.numpy()), images).min() >= bar
    assert cosines(runtime.embed_texts(PROMPTS), texts).min() >= bar
    measured = bundle.manifest.precisions[precision].parity
    assert measured["image_max_abs_diff"] > 0  # it is another encoder than the fp32 one
    assert golden.check(runtime)["image"] > 0


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_int8_answers_do_not_depend_on_a_batch_or_on_threads(family: str) -> None:
    bundle = quantized(family)
    rng = np.random.default_rng(3)
    # Of very different ranges, of which a common one would be felt.
    pixels = rng.standard_normal((5, 3, *bundle.manifest.image.size), np.float32)
    pixels *= np.float32([0.1, 1, 3, 10, 0.5]).reshape(5, 1, 1, 1)
    one, two = (
        edgeclip.Runtime(bundle, device="cpu", precision="int8", threads=threads)
        for threads in (1, 2)
    )
    alone = np.concatenate([one.encode(row[None]) for row in pixels])
    np.testing.assert_array_equal(one.encode(pixels), alone)
    np.testing.assert_allclose(two.encode(pixels), alone, atol=1e-6)
    texts = np.concatenate([one.embed_texts([prompt]) for prompt in PROMPTS])
    np.testing.assert_allclose(one.embed_texts(PROMPTS), texts, atol=1e-6)
    np.testing.assert_allclose(two.embed_texts(PROMPTS), texts, atol=1e-6)
    assert one.encode(pixels[:0]).shape == (0, bundle.manifest.embed_dim)


@pytest.mark.parametrize("family", ["vit", "vit-quickgelu", "siglip"])
def test_fp16_keeps_norms_softmax_and_the_outside_in_float(family: str) -> None:
    bundle = quantized(family)
    for kind in ("image_encoder", "text_encoder"):
        model = onnx.shape_inference.infer_shapes(onnx.load(bundle.encoder(kind, "fp16")))
        graph = model.graph
        onnx.checker.check_model(model)
        types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
        assert graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
        guarded = [n for n in graph.node if n.op_type in ("LayerNormalization", "Softmax")]
        assert guarded
        assert {types[node.input[0]] for node in guarded} == {TensorProto.FLOAT}
        products = [n for n in graph.node if n.op_type == "MatMul"]
        assert {types[node.input[0]] for node in products} == {TensorProto.FLOAT16}
        large = [t for t in graph.initializer if np.prod(t.dims) > 1000]
        assert {tensor.data_type for tensor in large} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("gemm", [False, True])
def test_a_product_that_int8_ruins_stays_in_float(tmp_path: Path, gemm: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32), np.float32)
    source = product(tmp_path / "fp32.onnx", weight, gemm=gemm)
    calm = rng.standard_normal((50, 64), np.float32)
    spiked = calm.copy()
    spiked[7, 3] = 1000
    for x, kept in ((calm, []), (spiked, ["product"])):
        target = tmp_path / "int8.onnx"
        (error,) = int8.product_errors(source, {"x": x}).values()
        assert (error > 0.1) == bool(kept)
        assert int8.to_int8(source, target, [{"x": x}], static=True) == kept
        found = run_graph(target, "y", x)
        np.testing.assert_allclose(found, x @ weight, atol=0.02 * np.abs(x @ weight).max())


def test_only_large_tables_are_halved(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = {"large": (5000, 256), "small": (50, 8)}
    arrays = {name: rng.standard_normal(size, np.float32) for name, size in tables.items()}
    graph = helper.make_graph(
        [helper.make_node("Gather", [name, "ids"], [f"{name} rows"]) for name in tables],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [
            helper.make_tensor_value_info(f"{name} rows", TensorProto.FLOAT, ["n", size[1]])
            for name, size in tables.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    int8._halve_tables(graph)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "m.onnx",
    )
    path, ids = tmp_path / "m.onnx", np.arange(20)
    np.testing.assert_array_equal(run_graph(path, "small rows", ids), arrays["small"][:20])
    halved = arrays["large"][:20].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run_graph(path, "large rows", ids), halved)


def test_answers_are_compared_on_a_data_set(tmp_path: Path) -> None:
    made, bundle = exported("vit"), quantized("vit")
    spec = f"folder:{folder_of_images(tmp_path / 'set')}"
    measured = fidelity.measure(bundle, made.source, fidelity.load(spec))
    assert measured.keys() == {"fp32", "fp16", "int8"}
    assert measured["fp32"]["top1_agreement"] == 1
    assert measured["fp32"]["attacked_accuracy_change"] == 0
    model, image = made.source.model, bundle.manifest.image
    runtime = edgeclip.Runtime(bundle, device="cpu", precision="int8", labels=["blue", "red"])
    files = sorted((tmp_path / "set").rglob("*.png"))
    with torch.no_grad():
        texts = torch.from_numpy(runtime.labels(["blue", "red"]).embeddings.copy())
        answers = (
            model.encode_image(torch.from_numpy(runtime.preprocess(files))) @ texts.T
        ).argmax(1)
    same = [a[0].index == b for a, b in zip(runtime.classify(files), answers.tolist(), strict=True)]
    assert measured["int8"]["top1_agreement"] == pytest.approx(np.mean(same), abs=1 / 8)
    assert image.size == (32, 32)
    with pytest.raises(ExportError, match="--data nonsense: unknown data set"):
        fidelity.load("nonsense")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"top1_agreement": 0.98, "attacked_accuracy_change": 0.0}, "98.0% of x, less than 99%"),
        ({"top1_agreement": float("nan"), "attacked_accuracy_change": 0.0}, "less than 99%"),
        ({"top1_agreement": 1.0, "attacked_accuracy_change": -0.02}, "under attack on x by -2.0%"),
        ({"top1_agreement": 1.0, "attacked_accuracy_change": 0.02}, r"under attack on x by \+2.0%"),
    ],
)
def test_what_does_not_keep_its_answers_is_refused(found: dict[str, float], reason: str) -> None:
    good = {"top1_agreement": 0.99, "attacked_accuracy_change": 0.01}
    fidelity.check({"int8": good}, "x")
    with pytest.raises(ExportError, match=reason):
        fidelity.check({"fp32": good, "int8": found}, "x")


def test_a_bundle_of_int8_alone_and_a_bar_that_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("vit")
    reuse_encoders(monkeypatch, made)
    manifest = made.bundle.manifest
    wording = Wording(manifest.description, manifest.templates, manifest.null_templates)
    manifest = export_bundle(made.source, tmp_path / "int8", wording, precisions=["int8"])
    assert list(manifest.precisions) == ["int8"]
    assert not list((tmp_path / "int8").glob("*.fp32.*"))
    assert edgeclip.Runtime(tmp_path / "int8", labels=["a", "b"]).precision == "int8"
    monkeypatch.setitem(parity.MIN_COSINE, "int8", 0.9999999)
    with pytest.raises(ExportError, match=r"int8 does not match PyTorch: \w+_min_cosine"):
        export_bundle(made.source, tmp_path / "none", wording, precisions=["fp32", "int8"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_leave_room_for_two_products_in_16_bits(family: str) -> None:
    """The u8 x s8 products of x86-64 without VNNI add pairs in int16: 2 * 255 * 64 is below 2**15."""
    bundle = quantized(family)
    for kind in ("image_encoder", "text_encoder"):
        model = onnx.load(bundle.encoder(kind, "int8"))
        weights = [
            numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
        ]
        largest = [int(np.abs(weight.astype(np.int16)).max()) for weight in weights]
        assert largest
        assert max(largest) <= 64
        assert max(largest) > 56  # or a bit would be wasted


def test_precisions_that_auto_considers(tmp_path: Path) -> None:
    bundle = quantized("vit")
    for measured, on_cpu, on_gpu in (
        ({"top1_agreement": 0.99}, ["fp32", "int8"], ["fp16", "fp32"]),
        ({}, ["fp32"], ["fp32"]),  # without a comparison of answers nothing else is taken unasked
    ):
        variants = {
            name: dataclasses.replace(variant, parity=measured)
            for name, variant in bundle.manifest.precisions.items()
        }
        folder = tmp_path / str(len(measured))
        shutil.copytree(bundle.path, folder)
        Bundle.write_manifest(folder, dataclasses.replace(bundle.manifest, precisions=variants))
        assert preferred(Bundle(folder), "cpu") == on_cpu
        assert preferred(Bundle(folder), "cuda") == preferred(Bundle(folder), "tensorrt") == on_gpu
