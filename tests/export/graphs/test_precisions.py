"""Encoders in int8 and fp16 of every family, compared with open_clip."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import edgeclip
from edgeclip.backends.select import preferred
from edgeclip.bundle import Bundle
from edgeclip.onnx_file import locations
from edgeclip.precisions import PRECISIONS, REFERENCE
from edgeclip.tools import golden
from export import ExportError
from export.bundle import export_bundle
from export.graphs import fp16, int8, save
from export.graphs.precisions import CONVERTERS
from tests.support.models.export_models import (
    cosines,
    exported,
    product,
    quantized,
    reuse_encoders,
    run_graph,
)
from train.models.wording import Wording

FAMILIES = ["vit", "vit-quickgelu", "resnet", "siglip"]  # the other families add no kind of node
PROMPTS = ["a dog", "a café", "two small red things beside a much larger blue one"]


def test_every_precision_except_the_reference_has_a_converter() -> None:
    assert {REFERENCE, *CONVERTERS} == set(PRECISIONS)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_nearly_open_clips(family: str, precision: str) -> None:
    tiny, bundle = exported(family), quantized(family)
    size = bundle.manifest.image.size
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(5))
    runtime = edgeclip.Runtime(bundle, device="cpu", precision=precision)
    ids = tiny.source.tokenizer(PROMPTS)
    with torch.no_grad():
        images, texts = tiny.source.model.encode_image(pixels), tiny.source.model.encode_text(ids)
    bar = PRECISIONS[precision].min_cosine
    assert cosines(runtime.encode(pixels.numpy()), images).min() >= bar
    assert cosines(runtime.embed_texts(PROMPTS), texts).min() >= bar
    measured = bundle.manifest.precisions[precision].parity
    assert measured["image_max_abs_diff"] > 0  # it is not the fp32 encoder
    assert golden.check(runtime)["image"] > 0


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_int8_answers_do_not_depend_on_a_batch_or_on_threads(family: str) -> None:
    bundle = quantized(family)
    rng = np.random.default_rng(3)
    # Very different ranges, so that a common range would show.
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


@pytest.mark.parametrize("family", ["resnet", "siglip"])
def test_weights_in_int8_are_within_half_a_step_of_their_block(family: str) -> None:
    bundle = quantized(family)
    exact, stored = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (
            bundle.encoder("image_encoder", precision) for precision in ("fp32", "int8-weights")
        )
    )
    names = [name for name, array in stored.items() if array.dtype == np.int8]
    assert names
    for name in names:
        scales = stored[f"{name}.scales"]
        blocks = stored[name] * scales
        np.testing.assert_array_less(
            abs(blocks - exact[name].reshape(blocks.shape)),
            np.broadcast_to(0.501 * scales, blocks.shape),
        )


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
        assert (error.relative > 0.1) == bool(kept)
        assert int8.to_int8(source, target, [{"x": x}], static=True) == kept
        actual = run_graph(target, "y", x)
        np.testing.assert_allclose(actual, x @ weight, atol=0.02 * np.abs(x @ weight).max())


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-qdq"])
def test_large_weights_are_saved_in_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 64), np.float32)
    source = product(tmp_path / "fp32.onnx", rng.standard_normal((64, 32), np.float32))
    convert = {
        "fp16": fp16.to_fp16,
        "int8": lambda *paths: int8.to_int8(*paths, [{"x": x}], static=True),
        "int8-qdq": lambda *paths: int8.to_qdq(*paths, [{"x": x}]),
    }[precision]
    single, large = tmp_path / "single.onnx", tmp_path / "large.onnx"
    convert(source, single)
    for limit in ("SINGLE_FILE", "LARGEST_MESSAGE"):
        monkeypatch.setattr(save, limit, 1000)
    convert(source, large)
    assert (locations(single), locations(large)) == (set(), {"large.onnx.data"})
    np.testing.assert_array_equal(run_graph(large, "y", x), run_graph(single, "y", x))


def test_large_tables_are_stored_in_a_quarter_or_in_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tables = {"large": (5000, 256), "spiked": (5000, 256), "small": (50, 8)}
    arrays = {name: rng.standard_normal(size, np.float32) for name, size in tables.items()}
    arrays["large"] *= rng.lognormal(size=(5000, 1)).astype(np.float32)  # each row its scale
    arrays["large"][7] = 0
    arrays["spiked"][:, 3] = 50  # leaves few of the 127 levels to the other columns
    graph = helper.make_graph(
        [helper.make_node("Gather", [name, "ids"], [f"{name} rows"]) for name in tables],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"])],
        [
            helper.make_tensor_value_info(f"{name} rows", TensorProto.FLOAT, ["n", "m", size[1]])
            for name, size in tables.items()
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    int8._shrink_tables(graph)
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types["large"] == TensorProto.INT8
    assert types["spiked"] == TensorProto.FLOAT16
    ids = np.arange(20).reshape(4, 5)
    np.testing.assert_array_equal(run_graph(path, "small rows", ids), arrays["small"][ids])
    halved = arrays["spiked"][ids].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run_graph(path, "spiked rows", ids), halved)
    exact = arrays["large"][ids]
    step = np.abs(exact).max(axis=-1, keepdims=True) / 127
    assert (np.abs(run_graph(path, "large rows", ids) - exact) <= 0.501 * step).all()


def test_a_bundle_of_int8_alone_and_a_missed_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    reuse_encoders(monkeypatch, tiny)
    manifest = tiny.bundle.manifest
    wording = Wording(manifest.description, manifest.templates, manifest.null_templates)
    manifest = export_bundle(tiny.source, tmp_path / "int8", wording, precisions=["int8"])
    assert list(manifest.precisions) == ["int8"]
    assert not list((tmp_path / "int8").glob("*.fp32.*"))
    assert edgeclip.Runtime(tmp_path / "int8", labels=["a", "b"]).precision == "int8"
    strict = dataclasses.replace(PRECISIONS["int8"], min_cosine=0.9999999)
    monkeypatch.setitem(PRECISIONS, "int8", strict)
    with pytest.raises(ExportError, match=r"int8 does not match PyTorch: \w+_min_cosine"):
        export_bundle(tiny.source, tmp_path / "none", wording, precisions=["fp32", "int8"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_leave_room_for_two_products_in_16_bits(family: str) -> None:
    """Check weights for x86-64 without VNNI, which adds u8 x s8 products in pairs in int16."""
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
        assert max(largest) > 56  # uses all seven bits


def test_precisions_that_auto_considers(tmp_path: Path) -> None:
    bundle = quantized("vit")
    for measured, on_cpu, on_gpu in (
        ({"top1_agreement": 0.99}, ["fp32", "int8", "int8-weights"], ["fp16", "fp32"]),
        ({}, ["fp32"], ["fp32"]),  # not verified on a data set
    ):
        variants = {
            name: dataclasses.replace(variant, parity=measured)
            for name, variant in bundle.manifest.precisions.items()
        }
        folder = tmp_path / str(len(measured))
        shutil.copytree(bundle.path, folder)
        Bundle.write_manifest(folder, dataclasses.replace(bundle.manifest, precisions=variants))
        assert preferred(Bundle(folder), "cpu") == on_cpu
        assert preferred(Bundle(folder), "tensorrt") == on_gpu
        on_cuda = [*on_gpu, "int8-weights"] if measured else on_gpu
        assert preferred(Bundle(folder), "cuda") == on_cuda
