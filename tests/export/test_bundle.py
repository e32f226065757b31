"""Bundles of every family of models: what is in them, and that they say what PyTorch says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import Bundle
from edgeclip.errors import LabelError
from edgeclip.purify import CosPurifier
from edgeclip.text.tokenizer import Tokenizer
from export import ExportError, golden
from export.bundle import export_bundle
from export.checks import evidence
from export.graphs import encoders, save
from tests.support.export_models import CONFIGS, Exported, exported, reuse_encoders, write_folder
from tests.support.paths import ROOT
from train.errors import ModelError
from train.models.checkpoints import load
from train.models.wording import image_spec, wording

FAMILIES = sorted(CONFIGS)
PROMPTS = ["", "a dog", "two cafés — “x”", "a much longer prompt about many small red things " * 9]


@pytest.fixture(params=FAMILIES)
def made(request: pytest.FixtureRequest) -> Exported:
    return exported(request.param)


def encoder(made: Exported, kind: str) -> OnnxEncoder:
    return OnnxEncoder(made.bundle.encoder(kind, "fp32"), device="cpu", threads=1)


def images(made: Exported, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, *made.bundle.manifest.image.size, generator=generator)


def cosines(found: NDArray[np.float32], wanted: torch.Tensor) -> NDArray[np.float64]:
    a, b = found.astype(np.float64), wanted.numpy().astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_image_embeddings_are_open_clips(made: Exported, batch: int) -> None:
    pixels = images(made, batch)
    with torch.no_grad():
        wanted = made.source.model.encode_image(pixels, normalize=False)
    found = encoder(made, "image_encoder").embed(pixels.numpy())
    assert found.dtype == np.float32
    assert cosines(found, wanted).min() > 1 - 1e-9
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)  # the norms as well


def test_text_embeddings_are_open_clips(made: Exported) -> None:
    text = made.bundle.manifest.text
    with torch.no_grad():
        wanted = made.source.model.encode_text(made.source.tokenizer(PROMPTS), normalize=False)
    assert cosines(wanted[:1].numpy(), wanted[1:2])[0] < 1 - 1e-5  # prompts do make a difference
    tokenizer = Tokenizer(
        made.bundle.file("tokenizer.json"), context_length=text.context_length, clean=text.clean
    )
    run = encoder(made, "text_encoder")
    for count in (1, 2, 4):  # padded to the longest of each batch
        ids = tokenizer(PROMPTS[:count])
        length = max(map(len, ids)) if text.dynamic_length else text.context_length
        padded = np.array([row + [text.pad_id] * (length - len(row)) for row in ids])
        found = run.embed(padded)
        assert cosines(found, wanted[:count]).min() > 1 - 1e-9
        np.testing.assert_allclose(found, wanted[:count], rtol=1e-4, atol=1e-5)


def test_vit_tokens_are_the_last_blocks_after_ln_post_and_projection() -> None:
    made = exported("vit")
    visual, pixels = made.source.model.visual, images(made, 2)
    with torch.no_grad():
        blocks = visual.forward_intermediates(
            pixels,
            indices=1,
            normalize_intermediates=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        parts = [blocks["image_intermediates_prefix"][0], blocks["image_intermediates"][0]]
        wanted = torch.cat(parts, dim=1) @ visual.proj
    run = encoder(made, "image_encoder")
    found = run.tokens(pixels.numpy())
    assert made.bundle.manifest.tokens == encoders.TokenSpec((2, 2), 1)
    assert found.shape == (2, 5, 48)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 0], run.embed(pixels.numpy()), rtol=1e-5, atol=1e-6)


def test_average_pooled_vit_gives_its_patches_only() -> None:
    made = exported("vit-avg")
    pixels = images(made, 2).numpy()
    run = encoder(made, "image_encoder")
    assert made.bundle.manifest.tokens == encoders.TokenSpec((2, 3), 0)
    np.testing.assert_allclose(
        run.tokens(pixels).mean(axis=1), run.embed(pixels), rtol=1e-4, atol=1e-5
    )


def test_siglip_gives_the_tokens_that_its_pooling_reads() -> None:
    made = exported("siglip")
    trunk, pixels = made.source.model.visual.trunk, images(made, 2)
    with torch.no_grad():
        wanted = trunk.forward_features(pixels)
    found = encoder(made, "image_encoder").tokens(pixels.numpy())
    assert made.bundle.manifest.tokens == encoders.TokenSpec((4, 4), 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["resnet", "convnext", "coca", "vit-quickgelu"])
def test_towers_without_tokens_say_so(family: str) -> None:
    made = exported(family)
    assert made.bundle.manifest.tokens is None
    graph = onnx.load(made.bundle.encoder("image_encoder", "fp32")).graph
    assert [value.name for value in graph.output] == ["embedding"]


def test_dimensions_are_symbolic(made: Exported) -> None:
    manifest = made.bundle.manifest
    session = onnxruntime.InferenceSession(made.bundle.encoder("image_encoder", "fp32"))
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
    wanted = {
        "pixels": ["batch", 3, *manifest.image.size],
        "embedding": ["batch", manifest.embed_dim],
    }
    if manifest.tokens:
        rows, columns = manifest.tokens.grid
        count = manifest.tokens.prefix + rows * columns
        wanted["tokens"] = ["batch", count, manifest.embed_dim]
    assert shapes == wanted
    session = onnxruntime.InferenceSession(made.bundle.encoder("text_encoder", "fp32"))
    length = "length" if manifest.text.dynamic_length else manifest.text.context_length
    assert session.get_inputs()[0].shape == ["batch", length]
    assert session.get_outputs()[0].shape == ["batch", manifest.embed_dim]


def test_only_causal_text_towers_are_cut() -> None:
    assert {f: exported(f).bundle.manifest.text.dynamic_length for f in FAMILIES} == {
        "vit": True,
        "vit-avg": True,  # a tower of its own (custom_text), causal
        "vit-quickgelu": False,
        "coca": False,  # reads its class token, behind the prompt
        "resnet": True,
        "convnext": True,
        "siglip": False,
    }


def test_files_hold_no_paths_of_this_machine(made: Exported) -> None:
    for name in made.bundle.manifest.files:
        contents = (made.bundle.path / name).read_bytes()
        for trace in (
            os.fsencode(ROOT),
            b"site-packages",
            b"torch/nn",
            b".py",
            b"pkg.torch",
            str(Path.home()).encode() + b"/",
        ):
            assert trace not in contents, (name, trace)
    model = onnx.load(made.bundle.encoder("image_encoder", "fp32"))
    assert model.opset_import[0].version == 20
    assert not model.functions


def test_a_bundle_is_complete(made: Exported) -> None:
    manifest = made.bundle.manifest
    made.bundle.verify()
    assert sorted(manifest.files) == sorted(
        path.name for path in made.bundle.path.iterdir() if path.name != "manifest.json"
    )
    assert len(manifest.files) == 5
    parity = manifest.precisions["fp32"].parity
    wanted = {"image_max_abs_diff", "image_min_cosine", "text_max_abs_diff", "text_min_cosine"}
    for kind in ("image", "text"):
        wanted |= {f"golden_{kind}_max_abs_diff", f"golden_{kind}_min_cosine"}
    wanted |= {"tokens_max_rel_diff"} if manifest.tokens else set()
    wanted |= {"text_cut_max_abs_diff"} if manifest.text.dynamic_length else set()
    assert parity.keys() == wanted
    assert all(value < 1e-5 for name, value in parity.items() if "cosine" not in name)
    assert manifest.source["weights_sha256"] == made.source.weights_sha256
    assert manifest.purification is None
    assert manifest.robustness == ()


CHECKED = [{"name": f"some {i}", "passed": True} for i in range(9)]


def result_file(
    path: Path, made: Exported, held: str = "1100", purifier: Any = None, **changes: Any
) -> Path:
    """A measurement of four images, of which three are right as they are."""
    settings = {
        "weights_sha256": made.source.weights_sha256,
        "templates": list(made.bundle.manifest.templates),
        "attack": ["apgd-ce", "apgd-t"],
        "data": "some", "samples": len(held), "norm": "l2", "eps": 0.5, "steps": 3, "restarts": 1,
        "seed": 0, "purification": purifier,
    }  # fmt: skip
    found = {
        "settings": settings | changes,
        "finished": len(held),
        "clean_accuracy": 0.75,
        "worst_case_accuracy": held.count("1") / len(held),
        "checks": [*CHECKED, {"name": "other", "passed": None}],
        "samples": {"clean": "1" * len(held), "apgd-ce/exact": held},
    }
    path.write_text(json.dumps(found))
    return path


def test_robustness_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = exported("vit")
    reuse_encoders(monkeypatch, made)
    words = wording(made.source)
    path = result_file(tmp_path / "a.json", made)
    rows, recommended = evidence.read([path], made.source, words.templates)
    manifest = export_bundle(
        made.source, tmp_path / "out", words, robustness=rows, purification=CosPurifier(2, 0.5)
    )
    assert manifest == Bundle(tmp_path / "out").manifest
    assert manifest.robustness == rows
    assert (rows[0].attacks, rows[0].eps) == (("apgd-ce", "apgd-t"), 0.5)
    assert (rows[0].clean_accuracy, rows[0].worst_case_accuracy) == (0.75, 0.5)
    assert rows[0].purification == "none"
    assert recommended is None
    assert manifest.purification == CosPurifier(2, 0.5)
    purified = result_file(tmp_path / "b.json", made, purifier={"steps": 1, "step_size": 2})
    assert evidence.read([path, Path(purified)], made.source, words.templates)[0] == rows


def test_purification_is_recommended_for_a_gain_that_is_no_chance(tmp_path: Path) -> None:
    made = exported("vit")

    def read(*held: str, **changes: Any) -> Any:
        """Of the first without purification, and the others each with one step more."""
        paths = []
        for i, marks in enumerate(held):
            purifier = {"steps": i, "step_size": 0.5} if i else None
            path = tmp_path / f"{i}.json"
            paths.append(result_file(path, made, marks, purifier, **(changes if i else {})))
        return evidence.read(paths, made.source, wording(made.source).templates)

    def recommended(*held: str, **changes: Any) -> Any:
        return read(*held, **changes)[1]

    none = "10" * 500
    assert recommended(none) is None
    assert recommended(none, none) is None
    assert recommended(none, "111" + none[3:]) is None  # one image of a thousand: by chance
    assert recommended(none, "1" * 6 + none[6:]) is None  # 3: 1.73 standard errors
    some = "1" * 8 + none[8:]  # 4: 2.00 of them
    assert recommended(none, some) == CosPurifier(1, 0.5)
    assert recommended(none, some, none) is None  # the better of two has to be surer
    better, best = "1" * 40 + none[40:], "1" * 80 + none[80:]
    rows, chosen = read(none, better, best)
    assert chosen == CosPurifier(2, 0.5)
    assert [row.purification for row in rows] == ["none", "cos 2 x 0.5"]
    assert recommended(best, better) is None
    assert recommended(none, best, eps=0.25) is None  # not measured alike
    assert recommended(none, best, steps=2) is None
    assert recommended("10" * 400, "1" * 80 + "10" * 360) is None  # of too few images


def test_purified_figures_that_failed_are_left_out(tmp_path: Path) -> None:
    made = exported("vit")
    words = wording(made.source)
    none = result_file(tmp_path / "a.json", made, "10" * 500)
    best = result_file(tmp_path / "b.json", made, "1" * 1000, {"steps": 1, "step_size": 0.5})
    assert evidence.read([none, best], made.source, words.templates)[1] == CosPurifier(1, 0.5)
    found = json.loads(best.read_text())
    best.write_text(json.dumps(found | {"checks": [*CHECKED, {"name": "x", "passed": False}]}))
    rows, recommended = evidence.read([none, best], made.source, words.templates)
    assert (len(rows), recommended) == (1, None)


def test_figures_of_another_model_are_refused(tmp_path: Path) -> None:
    made, path = exported("vit"), tmp_path / "a.json"
    templates = wording(made.source).templates

    def message() -> str:
        with pytest.raises(ExportError) as caught:
            evidence.read([path], made.source, templates)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is no result of python -m train.evaluate" in message()
    result_file(path, made, weights_sha256="0")
    assert "was measured on other weights" in message()
    result_file(path, made, quick_gelu=True)
    assert "was measured with another activation" in message()
    result_file(path, made, templates=["other {}"])
    assert "was measured with other templates" in message()
    found = json.loads(result_file(path, made).read_text())
    path.write_text(json.dumps(found | {"finished": 3}))
    assert "is not finished" in message()
    path.write_text(json.dumps(found | {"checks": CHECKED}))
    assert "was not checked" in message()
    path.write_text(json.dumps(found | {"checks": [*CHECKED, {"name": "x", "passed": False}]}))
    assert "failed x" in message()
    result_file(path, made, eps="much")
    assert "is no result of python -m train.evaluate" in message()


def test_logit_scale_and_bias() -> None:
    manifest = exported("siglip").bundle.manifest
    model = exported("siglip").source.model
    assert manifest.logit_bias == model.logit_bias.item() == -10
    assert manifest.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert exported("vit").bundle.manifest.logit_bias == 0


def test_wording_and_preprocessing_come_from_the_folder() -> None:
    manifest = exported("vit-avg").bundle.manifest
    assert manifest.description == "a tiny model"
    assert manifest.templates == ("a {}.", "the {}.")
    assert manifest.null_templates == ("a {}.",)
    image = manifest.image
    assert image.size == (32, 48)
    assert image.mean == (0.4, 0.5, 0.6)
    assert image.std == (0.2, 0.25, 0.3)
    assert (image.resize, image.interpolation, image.fill) == ("squash", "bilinear", 0)


def test_wording_of_the_command_line_comes_first() -> None:
    source = exported("vit").source
    words = wording(source, "mine", ["one {}", "two {}"])
    assert words.templates == ("one {}", "two {}")
    assert words.null_templates == ("a {}.",)
    assert words.description == "mine"
    for bad in ("no place", "{0} {1}", "{name}", "{"):
        with pytest.raises(LabelError, match=r"has no \{\} for the class name"):
            wording(source, templates=[bad])


def test_null_text_is_the_mean_of_the_empty_prompts() -> None:
    made = exported("vit")
    with torch.no_grad():
        rows = made.source.model.encode_text(made.source.tokenizer(["a ."]), normalize=True)
    np.testing.assert_allclose(made.bundle.null_text, rows[0], atol=1e-6)
    assert np.linalg.norm(made.bundle.null_text) == pytest.approx(1, abs=1e-6)


def test_golden_is_open_clips_and_the_bundle_agrees(made: Exported) -> None:
    golden, manifest = made.bundle.golden(), made.bundle.manifest
    model = made.source.model
    height, width = manifest.image.size
    assert golden["image"].dtype == np.uint8
    assert golden["image"].shape == (3 * height // 2, 9 * width // 5, 3)
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    pixels = image_transform_v2(settings, is_train=False)(Image.fromarray(golden["image"]))
    np.testing.assert_array_equal(golden["pixels"], pixels)
    prompts = golden["prompts"].tolist()
    assert len(prompts) == 4
    assert any(not prompt.isascii() for prompt in prompts)
    ids = made.source.tokenizer(prompts).numpy()
    length = golden["ids"].shape[1]
    np.testing.assert_array_equal(golden["ids"], ids[:, :length])
    assert (ids[:, length:] == manifest.text.pad_id).all()
    with torch.no_grad():
        image = model.encode_image(pixels[None], normalize=True)[0]
        text = model.encode_text(torch.from_numpy(ids), normalize=True)
    np.testing.assert_allclose(golden["embedding"], image, atol=1e-6)
    np.testing.assert_allclose(golden["text_embeddings"], text, atol=1e-6)
    run = encoder(made, "text_encoder").embed(golden["ids"])
    assert cosines(run, text).min() > 1 - 1e-9


def test_golden_picture_is_always_the_same() -> None:
    first, second = golden.synthetic_image(48, 57), golden.synthetic_image(48, 57)
    np.testing.assert_array_equal(first, second)
    assert first.std() > 30  # levels: there is something to see


def test_the_model_is_left_as_it_was() -> None:
    visual = exported("vit").source.model.visual
    assert visual.output_tokens is False


def test_a_difference_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("vit")
    reuse_encoders(monkeypatch, made, spoil="image_encoder.fp32.onnx")
    (tmp_path / "out").mkdir()  # an empty directory is no obstacle
    with pytest.raises(ExportError, match=r"image_max_abs_diff is .* no bundle was written"):
        export_bundle(made.source, tmp_path / "out", wording(made.source))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())


def test_weights_too_large_for_one_file_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("vit")
    monkeypatch.setattr(save, "SINGLE_FILE", 1000)
    encoders.export_image_encoder(made.source.model, (32, 32), tmp_path / "image.onnx")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["image.onnx", "image.onnx.data"]
    pixels = images(made, 2).numpy()
    found = OnnxEncoder(tmp_path / "image.onnx", device="cpu", threads=1).embed(pixels)
    np.testing.assert_array_equal(found, encoder(made, "image_encoder").embed(pixels))


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
    export_by_itself(Fixed(), path)  # PyTorch does not mind
    wanted = ("batch", 3, 4, 4)
    with pytest.raises(ExportError, match="has the shapes"):
        encoders.check_shapes(path, {"pixels": wanted}, {"embedding": wanted})


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            raise ValueError("this layer is too odd")

    with pytest.raises(ExportError, match="cannot export this model") as caught:
        export_by_itself(Odd(), tmp_path / "odd.onnx")
    assert "too odd" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"resize_mode": "shortest"}, "not square"),
    ],
)
def test_preprocessing_that_the_runtime_does_not_know(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    folder = write_folder(tmp_path, "vit-avg")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        image_spec(load(str(folder), None).model)
