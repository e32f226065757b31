"""Contents of a bundle, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.errors import LabelError
from export import ExportError
from export.bundle import export_bundle
from tests.support.models.export_models import (
    CONFIGS,
    Exported,
    cosines,
    exported,
    reuse_encoders,
    write_folder,
)
from tests.support.paths import ROOT
from train.errors import ModelError
from train.models.checkpoints import load
from train.models.wording import image_spec, wording


@pytest.fixture(params=sorted(CONFIGS))
def tiny(request: pytest.FixtureRequest) -> Exported:
    return exported(request.param)


def test_a_bundle_is_complete(tiny: Exported) -> None:
    manifest = tiny.bundle.manifest
    tiny.bundle.verify()
    assert sorted(manifest.files) == sorted(
        path.name for path in tiny.bundle.path.iterdir() if path.name != "manifest.json"
    )
    assert len(manifest.files) == (7 if manifest.tokens else 5)
    parity = manifest.precisions["fp32"].parity
    expected = {"image_max_abs_diff", "image_min_cosine", "text_max_abs_diff", "text_min_cosine"}
    for kind in ("image", "text"):
        expected |= {f"golden_{kind}_max_abs_diff", f"golden_{kind}_min_cosine"}
    expected |= {"tokens_max_rel_diff"} if manifest.tokens else set()
    expected |= {"text_cut_max_abs_diff"} if manifest.text.dynamic_length else set()
    assert parity.keys() == expected
    assert all(value < 1e-5 for name, value in parity.items() if "cosine" not in name)
    assert manifest.source["weights_sha256"] == tiny.source.weights_sha256
    assert manifest.purification is None
    assert manifest.robustness == ()


def test_files_hold_no_paths_of_this_machine(tiny: Exported) -> None:
    for name in tiny.bundle.manifest.files:
        contents = (tiny.bundle.path / name).read_bytes()
        for trace in (
            os.fsencode(ROOT),
            b"site-packages",
            b"torch/nn",
            b".py",
            b"pkg.torch",
            str(Path.home()).encode() + b"/",
        ):
            assert trace not in contents, (name, trace)
    model = onnx.load(tiny.bundle.encoder("image_encoder", "fp32"))
    assert model.opset_import[0].version == 20
    assert not model.functions


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
    tiny = exported("vit")
    with torch.no_grad():
        rows = tiny.source.model.encode_text(tiny.source.tokenizer(["a ."]), normalize=True)
    np.testing.assert_allclose(tiny.bundle.null_text, rows[0], atol=1e-6)
    assert np.linalg.norm(tiny.bundle.null_text) == pytest.approx(1, abs=1e-6)


def test_golden_is_open_clips_and_the_bundle_agrees(tiny: Exported) -> None:
    golden, manifest = tiny.bundle.golden(), tiny.bundle.manifest
    model = tiny.source.model
    height, width = manifest.image.size
    assert golden["image"].dtype == np.uint8
    assert golden["image"].shape == (3 * height // 2, 9 * width // 5, 3)
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    pixels = image_transform_v2(settings, is_train=False)(Image.fromarray(golden["image"]))
    np.testing.assert_array_equal(golden["pixels"], pixels)
    prompts = golden["prompts"].tolist()
    assert len(prompts) == 4
    assert any(not prompt.isascii() for prompt in prompts)
    ids = tiny.source.tokenizer(prompts).numpy()
    length = golden["ids"].shape[1]
    np.testing.assert_array_equal(golden["ids"], ids[:, :length])
    assert (ids[:, length:] == manifest.text.pad_id).all()
    with torch.no_grad():
        image = model.encode_image(pixels[None], normalize=True)[0]
        text = model.encode_text(torch.from_numpy(ids), normalize=True)
    np.testing.assert_allclose(golden["embedding"], image, atol=1e-6)
    np.testing.assert_allclose(golden["text_embeddings"], text, atol=1e-6)
    encoder = OnnxEncoder(tiny.bundle.encoder("text_encoder", "fp32"), device="cpu", threads=1)
    assert cosines(encoder.embed(golden["ids"]), text).min() > 1 - 1e-9


def test_a_difference_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    reuse_encoders(monkeypatch, tiny, spoil="image_encoder.fp32.onnx")
    (tmp_path / "out").mkdir()  # an empty directory may be replaced
    with pytest.raises(ExportError, match=r"image_max_abs_diff is .* no bundle was written"):
        export_bundle(tiny.source, tmp_path / "out", wording(tiny.source))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())


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
