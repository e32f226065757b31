"""Exported encoders of every family of models, compared with open_clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.text.tokenizer import Tokenizer
from export import ExportError
from export.graphs import encoders, save
from tests.support.models.export_models import CONFIGS, Exported, cosines, exported

FAMILIES = sorted(CONFIGS)
PROMPTS = ["", "a dog", "two cafés — “x”", "a much longer prompt about many small red things " * 9]


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> Exported:
    return exported(request.param)


def encoder(tiny: Exported, kind: str) -> OnnxEncoder:
    return OnnxEncoder(tiny.bundle.encoder(kind, "fp32"), device="cpu", threads=1)


def tokens_of(tiny: Exported, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    path = tiny.bundle.encoder("image_tokens", "fp32")
    return OnnxEncoder(path, device="cpu", threads=1, output="tokens").embed(pixels)


def images(tiny: Exported, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, *tiny.bundle.manifest.image.size, generator=generator)


@pytest.mark.parametrize("batch", [1, 3])
def test_image_embeddings_are_open_clips(tiny: Exported, batch: int) -> None:
    pixels = images(tiny, batch)
    with torch.no_grad():
        expected = tiny.source.model.encode_image(pixels, normalize=False)
    actual = encoder(tiny, "image_encoder").embed(pixels.numpy())
    assert actual.dtype == np.float32
    assert cosines(actual, expected).min() > 1 - 1e-9
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)  # also compares norms


def test_text_embeddings_are_open_clips(tiny: Exported) -> None:
    text = tiny.bundle.manifest.text
    with torch.no_grad():
        expected = tiny.source.model.encode_text(tiny.source.tokenizer(PROMPTS), normalize=False)
    assert cosines(expected[:1].numpy(), expected[1:2])[0] < 1 - 1e-5  # prompts differ
    tokenizer = Tokenizer(
        tiny.bundle.file("tokenizer.json"), context_length=text.context_length, clean=text.clean
    )
    run = encoder(tiny, "text_encoder")
    for count in (1, 2, 4):  # padded to the longest of each batch
        ids = tokenizer(PROMPTS[:count])
        length = max(map(len, ids)) if text.dynamic_length else text.context_length
        padded = np.array([row + [text.pad_id] * (length - len(row)) for row in ids])
        actual = run.embed(padded)
        assert cosines(actual, expected[:count]).min() > 1 - 1e-9
        np.testing.assert_allclose(actual, expected[:count], rtol=1e-4, atol=1e-5)


def test_vit_tokens_are_the_last_blocks_after_ln_post_and_projection() -> None:
    tiny = exported("vit")
    visual, pixels = tiny.source.model.visual, images(tiny, 2)
    with torch.no_grad():
        blocks = visual.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        tokens = [blocks["image_intermediates_prefix"][0], blocks["image_intermediates"][0]]
        expected = torch.cat(tokens, dim=1) @ visual.proj
    actual = tokens_of(tiny, pixels.numpy())
    assert tiny.bundle.manifest.tokens == encoders.TokenSpec((2, 2), 1)
    assert actual.shape == (2, 5, 48)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    embedding = encoder(tiny, "image_encoder").embed(pixels.numpy())
    np.testing.assert_allclose(actual[:, 0], embedding, rtol=1e-5, atol=1e-6)


def test_average_pooled_vit_gives_its_patches_only() -> None:
    tiny = exported("vit-avg")
    pixels = images(tiny, 2).numpy()
    run = encoder(tiny, "image_encoder")
    assert tiny.bundle.manifest.tokens == encoders.TokenSpec((2, 3), 0)
    means = tokens_of(tiny, pixels).mean(axis=1)
    np.testing.assert_allclose(means, run.embed(pixels), rtol=1e-4, atol=1e-5)


def test_siglip_gives_the_tokens_that_its_pooling_reads() -> None:
    tiny = exported("siglip")
    trunk, pixels = tiny.source.model.visual.trunk, images(tiny, 2)
    with torch.no_grad():
        expected = trunk.forward_features(pixels)
    actual = tokens_of(tiny, pixels.numpy())
    assert tiny.bundle.manifest.tokens == encoders.TokenSpec((4, 4), 0)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "grid"), [("convnext", (2, 2)), ("efficientnet", (7, 7))])
def test_feature_maps_go_through_the_head_place_by_place(
    family: str, grid: tuple[int, int]
) -> None:
    tiny = exported(family)
    visual, pixels = tiny.source.model.visual, images(tiny, 2)
    with torch.no_grad():
        places = visual.trunk.forward_features(pixels).permute(0, 2, 3, 1)
        if family == "convnext":  # has a norm after its pooling
            norm = visual.trunk.head.norm
            places = F.layer_norm(places, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        expected = visual.head(places).flatten(1, 2)
    assert tiny.bundle.manifest.tokens == encoders.TokenSpec(grid, 0)
    actual = tokens_of(tiny, pixels.numpy())
    assert actual.shape == (2, grid[0] * grid[1], 48)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_embedding_of_a_feature_map_needs_no_token() -> None:
    """Compare the graph with that of a tower without tokens: it has the same nodes."""
    tiny = exported("efficientnet")
    graph = onnx.load(tiny.bundle.encoder("image_encoder", "fp32"), load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Gemm") == 2  # the MLP's, of pooled features
    assert "Transpose" not in operators  # which the tokens need
    assert operators[-5:] == ["ReduceMean", "Reshape", "Gemm", "Gelu", "Gemm"]


@pytest.mark.parametrize("family", ["resnet", "coca", "vit-quickgelu"])
def test_towers_without_tokens_say_so(family: str) -> None:
    tiny = exported(family)
    assert tiny.bundle.manifest.tokens is None
    assert tiny.bundle.manifest.precisions["fp32"].image_tokens is None
    graph = onnx.load(tiny.bundle.encoder("image_encoder", "fp32")).graph
    assert [value.name for value in graph.output] == ["embedding"]


def test_dimensions_are_symbolic(tiny: Exported) -> None:
    manifest = tiny.bundle.manifest
    pixels = {"pixels": ["batch", 3, *manifest.image.size]}
    expected = {"image_encoder": pixels | {"embedding": ["batch", manifest.embed_dim]}}
    if manifest.tokens:
        rows, columns = manifest.tokens.grid
        count = manifest.tokens.prefix + rows * columns
        expected["image_tokens"] = pixels | {"tokens": ["batch", count, manifest.embed_dim]}
    for kind, shapes in expected.items():
        session = onnxruntime.InferenceSession(tiny.bundle.encoder(kind, "fp32"))
        values = (*session.get_inputs(), *session.get_outputs())
        assert {value.name: value.shape for value in values} == shapes
    session = onnxruntime.InferenceSession(tiny.bundle.encoder("text_encoder", "fp32"))
    length = "length" if manifest.text.dynamic_length else manifest.text.context_length
    assert session.get_inputs()[0].shape == ["batch", length]
    assert session.get_outputs()[0].shape == ["batch", manifest.embed_dim]


@pytest.mark.parametrize("family", ["vit", "siglip", "efficientnet"])
def test_the_token_graph_shares_the_weights_of_the_encoder(family: str) -> None:
    bundle = exported(family).bundle
    paths = [bundle.encoder(kind, "fp32") for kind in ("image_encoder", "image_tokens")]
    data = "image_encoder.fp32.onnx.data"
    tensors: list[dict[str, bytes]] = []
    for path in paths:
        model = onnx.load(path, load_external_data=False)
        external = [
            x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL
        ]
        assert {e.value for x in external for e in x.external_data if e.key == "location"} == {data}
        tensors.append({x.name: x.SerializeToString() for x in external})  # with their offsets
        onnx.checker.check_model(onnx.load(path))
    embedding, tokens = tensors
    shared = embedding.keys() & tokens.keys()
    assert {name: embedding[name] for name in shared} == {name: tokens[name] for name in shared}
    assert len(shared) > 0.5 * len(embedding)  # the pooling of SigLIP has weights of its own
    graphs = sum(path.stat().st_size for path in paths)
    assert graphs < 0.5 * (bundle.path / data).stat().st_size


def test_only_causal_and_masked_text_towers_are_cut() -> None:
    assert {f: exported(f).bundle.manifest.text.dynamic_length for f in FAMILIES} == {
        "vit": True,
        "vit-avg": True,  # separate (custom_text), causal
        "vit-quickgelu": False,
        "coca": False,  # reads its class token, after the prompt
        "resnet": True,
        "convnext": True,
        "efficientnet": True,
        "siglip": False,
        "bert": True,  # masks its padding
        "roberta": True,
    }


def test_the_model_is_left_as_it_was() -> None:
    visual = exported("vit").source.model.visual
    assert visual.output_tokens is False


def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    monkeypatch.setattr(save, "SINGLE_FILE", 1000)
    encoders.export_image_encoder(tiny.source.model, (32, 32), tmp_path / "image.onnx")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["image.onnx", "image.onnx.data"]
    pixels = images(tiny, 2).numpy()
    actual = OnnxEncoder(tmp_path / "image.onnx", device="cpu", threads=1).embed(pixels)
    np.testing.assert_array_equal(actual, encoder(tiny, "image_encoder").embed(pixels))


def export_by_itself(encoder: torch.nn.Module, path: Path) -> None:
    dims = {0: torch.export.Dim("batch")}
    encoders.export_graph(
        encoder, (torch.zeros(2, 3, 4, 4),), ["pixels"], ["embedding"], (dims,), path
    )


def test_a_fixed_batch_is_noticed(tmp_path: Path) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels + torch.ones(2, 3, 4, 4)

    path = tmp_path / "fixed.onnx"
    export_by_itself(Fixed(), path)  # PyTorch accepts it
    expected = ("batch", 3, 4, 4)
    with pytest.raises(ExportError, match="has the shapes"):
        encoders.check_shapes(path, {"pixels": expected}, {"embedding": expected})


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            raise ValueError("this layer is too odd")

    with pytest.raises(ExportError, match="cannot export this model") as caught:
        export_by_itself(Odd(), tmp_path / "odd.onnx")
    assert "too odd" in str(caught.value)
    assert "\n" not in str(caught.value)
