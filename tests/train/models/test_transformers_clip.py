"""Models in the format of Hugging Face transformers, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save_file

from edgeclip import Runtime
from edgeclip.storage import sha256
from export.__main__ import main
from tests.support.models.export_models import VOCABULARY, write_folder
from tests.support.models.transformers_models import (
    VISION,
    make_model,
    write_model,
    write_preprocessing,
    write_tokenizer,
)
from train.errors import ModelError
from train.models.checkpoints import Source, load
from train.models.transformers_clip import read_config, to_open_clip
from train.models.weight_files import join_sha256
from train.models.wording import image_spec
from train.run.folder import copy_tokenizer, save_model

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["dog", "a photo of a small dog.", "", "9 cats, 2 dogs and 17 birds " * 9]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a complete transformers folder, with QuickGELU."""
    folder = write_model(tmp_path / "hf", make_model())
    write_tokenizer(folder)
    write_preprocessing(folder)
    return folder


def embeddings(model: transformers.CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> tuple:
    """Return the embeddings of images and texts, by transformers alone."""
    output = model(pixel_values=pixels, input_ids=ids)
    return output.image_embeds, output.text_embeds


def check_same(source: Source, model: transformers.CLIPModel, ids: torch.Tensor) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images, texts = embeddings(model, pixels, ids)
    actual = source.model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(actual, images, rtol=0, atol=1e-5)
    actual = source.model.encode_text(source.tokenizer(PROMPTS), normalize=True)
    torch.testing.assert_close(actual, texts, rtol=0, atol=1e-5)
    assert source.model.logit_scale == model.logit_scale


def their_ids(folder: Path) -> torch.Tensor:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return tokenizer(
        PROMPTS, return_tensors="pt", padding=True, truncation=True, max_length=24
    ).input_ids


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [VOCABULARY - 1, 2])  # 2: in old configurations, not the end mark
def test_a_folder_computes_what_transformers_computes(
    tmp_path: Path, act: str, eos: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(act, eos_token_id=eos, bos_token_id=0 if eos == 2 else VOCABULARY - 2)
    folder = write_model(tmp_path / "hf", model)
    write_tokenizer(folder)
    write_preprocessing(folder)
    source = load(str(folder), None)
    ids = their_ids(folder)
    assert (ids[:, -1] == VOCABULARY - 1).all()
    assert torch.equal(source.tokenizer(PROMPTS), ids)
    check_same(source, model, ids)
    assert source.quick_gelu == (act == "quick_gelu")
    assert (source.name, source.pretrained) == ("hf", "model.safetensors")
    assert source.weights_sha256 == sha256(folder / "model.safetensors")
    assert "assuming" not in capsys.readouterr().err
    assert image_spec(source.model).mean == (0.5, 0.4, 0.3)


def test_other_sizes_and_epsilons(tmp_path: Path) -> None:
    """Use values other than open_clip's defaults, with heads not 64 wide."""
    vision = {"layer_norm_eps": 0.05, "intermediate_size": 100, "num_attention_heads": 4}
    model = make_model(
        "gelu", vision, layer_norm_eps=0.02, intermediate_size=77, num_attention_heads=4
    )
    folder = write_model(tmp_path / "hf", model)
    write_tokenizer(folder)
    check_same(load(str(folder), None), model, their_ids(folder))


@pytest.mark.parametrize("width", [224, 768, 896])
@pytest.mark.parametrize("inner", [230, 1000, 3072])
def test_mlp_width_that_is_no_multiple_of_the_width(tmp_path: Path, width: int, inner: int) -> None:
    """Guard against rounding: 230 / 224 * 224 < 230 in floating point, and open_clip rounds down."""
    text = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 4}
    config = {"model_type": "clip", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text_cfg = read_config(tmp_path)["text_cfg"]
    assert int(text_cfg["width"] * text_cfg["mlp_ratio"]) == inner


def test_a_configuration_may_leave_out_defaults(tmp_path: Path) -> None:
    """Read a configuration as transformers 4 saved it."""
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    config = read_config(tmp_path)
    assert (config["embed_dim"], config["quick_gelu"]) == (512, True)
    vision = {"image_size": 224, "patch_size": 32, "layers": 12}
    assert vision.items() <= config["vision_cfg"].items()
    assert {"vocab_size": 49408, "eos_id": 49407}.items() <= config["text_cfg"].items()


@pytest.mark.parametrize("form", ["pytorch_model.bin", "shards"])
def test_weights_of_a_folder(folder: Path, form: str) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    state["text_model.embeddings.position_ids"] = torch.arange(24)[None]  # saved by old versions
    if form == "shards":
        keys = sorted(state)
        shards = {"model-00001-of-00002.safetensors": keys[:9]}
        shards["model-00002-of-00002.safetensors"] = keys[9:]
        for name, shard in shards.items():
            save_file({key: state[key] for key in shard}, folder / name)
        table = {key: name for name, shard in shards.items() for key in shard}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": table}))
    else:
        torch.save(state, folder / form)
    check_same(load(str(folder), None), make_model(), their_ids(folder))


def test_a_folder_becomes_a_bundle(folder: Path, tmp_path: Path) -> None:
    """Export with an image tower from a file, which has the same weights."""
    state = load_file(folder / "model.safetensors")
    tower = {key: value for key, value in state.items() if key.startswith("vis")}
    torch.save(tower, tmp_path / "tower.pt")
    options = ["--visual", str(tmp_path / "tower.pt"), "-o", str(tmp_path / "bundle")]
    assert main([str(folder), *options]) == 0
    runtime = Runtime(tmp_path / "bundle", device="cpu")
    manifest = runtime.bundle.manifest
    hashes = [sha256(folder / "model.safetensors"), sha256(tmp_path / "tower.pt")]
    assert manifest.source == {
        "model": "hf",
        "pretrained": "model.safetensors",
        "weights_sha256": join_sha256(hashes),
        "base_sha256": hashes[0],
        "visual": "tower.pt",
        "visual_sha256": hashes[1],
    }
    assert manifest.description == "hf, weights model.safetensors, image encoder tower.pt"
    model, prompts = make_model(), PROMPTS[:2] + PROMPTS[3:]
    inputs = transformers.CLIPTokenizer.from_pretrained(folder)(
        prompts, return_tensors="pt", padding=True, truncation=True, max_length=24
    )
    pixels = torch.zeros(1, 3, 32, 32)
    images, texts = embeddings(model, pixels, inputs.input_ids)
    actual = torch.from_numpy(runtime.embed_texts(prompts))
    torch.testing.assert_close(actual, texts, rtol=0, atol=1e-4)
    grey = (255 * torch.tensor([0.5, 0.4, 0.3])).round().to(torch.uint8).expand(32, 32, 3)
    exact = (grey[0, 0] / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.3])
    images, _ = embeddings(model, exact[None, :, None, None].expand(1, 3, 32, 32), inputs.input_ids)
    actual = torch.from_numpy(runtime.embed_images([grey.numpy()]))
    torch.testing.assert_close(actual, images, rtol=0, atol=1e-4)


def test_a_run_that_starts_from_a_folder(folder: Path, tmp_path: Path) -> None:
    """Save and reload as train.tgazsr does: an open_clip folder with the tokenizer's files."""
    source, run = load(str(folder), None), tmp_path / "run"
    run.mkdir()
    copy_tokenizer(source, run)
    save_model(run, source.model, source.config)
    again = load(str(run), None)
    assert again.quick_gelu
    check_same(again, make_model(), their_ids(folder))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_weights_for_a_named_architecture(
    tmp_path: Path, act: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Load into an open_clip model; config.json beside the weights names the activation."""
    architecture = write_folder(tmp_path / "vit", "vit")
    path = write_model(tmp_path / "hf", make_model(act, intermediate_size=128, vision={
        "intermediate_size": 256})) / "model.safetensors"  # fmt: skip
    source = load(str(architecture), str(path))
    model = make_model(act, intermediate_size=128, vision={"intermediate_size": 256})
    check_same(source, model, source.tokenizer(PROMPTS))
    assert source.quick_gelu == (act == "quick_gelu")
    assert "assuming" not in capsys.readouterr().err
    (path.parent / "config.json").unlink()
    assert not load(str(architecture), str(path)).quick_gelu
    assert "assuming GELU" in capsys.readouterr().err


@pytest.mark.parametrize("bare", [False, True])
def test_an_image_tower_over_base_weights(
    folder: Path, tmp_path: Path, bare: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Load the image tower of a CLIPVisionModelWithProjection."""
    other = make_model("gelu")
    for parameter in other.parameters():
        parameter *= 1.1
    tower = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**VISION, projection_dim=48, hidden_act="gelu")
    ).eval()
    tower.load_state_dict(
        {k: v for k, v in other.state_dict().items() if k.startswith("visi")}, strict=False
    )
    path = write_model(tmp_path / "tower", tower) / "model.safetensors"
    if bare:  # CLIPVisionModel of transformers 5, and the projection
        state = {k.removeprefix("vision_model."): v for k, v in load_file(path).items()}
        save_file(state, path)
    source = load(str(folder), None, visual=str(path), quick_gelu=False)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tower(pixel_values=pixels).image_embeds
    torch.testing.assert_close(source.model.encode_image(pixels), expected, rtol=1e-5, atol=1e-5)
    base = sha256(folder / "model.safetensors")
    assert source.weights_sha256 == join_sha256([base, sha256(path)])
    load(str(folder), None, visual=str(path))
    assert "model.safetensors was trained with GELU, the base weights with QuickGELU" in (
        capsys.readouterr().err
    )
    with pytest.raises(ModelError, match="image tower alone: name its weights with --visual"):
        load(str(path.parent), None)


@pytest.mark.parametrize("text", ["{}", "not json", '{"model_type": "bert"}'])
def test_a_foreign_folder_with_the_name_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-S-16").mkdir()
    (tmp_path / "ViT-S-16" / "config.json").write_text(text)
    with pytest.raises(ModelError, match="'some' is neither a file nor a tag: ViT-S-16 has no"):
        load("ViT-S-16", "some")


def test_queries_without_keys_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    assert "transformer.resblocks.1.attn.q_proj.bias" in to_open_clip(state)
    save_file(state, path)
    with pytest.raises(ModelError, match=r"missing: transformer.resblocks.1.attn.in_proj_bias;"):
        load(str(folder), None)


def test_a_missing_tokenizer_is_replaced_by_clips_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    model = make_model(**vocabulary, max_position_embeddings=77)
    folder = write_model(tmp_path / "hf", model)
    source = load(str(folder), None)
    message = capsys.readouterr().err
    assert "holds no tokenizer: using CLIP's" in message
    assert "holds no preprocessor_config.json: assuming CLIP's mean" in message
    assert isinstance(source.tokenizer, SimpleTokenizer)
    check_same(source, model, source.tokenizer(PROMPTS))
    spec = image_spec(source.model)
    assert (spec.mean, spec.std) == (CLIP_MEAN, CLIP_STD)
    assert (spec.size, spec.resize, spec.interpolation) == ((32, 32), "shortest", "bicubic")
    with pytest.raises(ModelError, match="its tokenizer 49408: name the right"):
        load(str(write_model(tmp_path / "small", make_model())), None)


@pytest.mark.parametrize(
    ("name", "other", "resize", "interpolation"),
    [
        ("preprocessor_config.json", {}, "shortest", "bicubic"),
        ("processor_config.json", {"resample": 2}, "shortest", "bilinear"),
        ("preprocessor_config.json", {"size": 32, "crop_size": 32}, "shortest", "bicubic"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 32}, "do_center_crop": False},
         "squash", "bicubic"),
    ],
)  # fmt: skip
def test_preprocessing(
    folder: Path, name: str, other: dict[str, Any], resize: str, interpolation: str
) -> None:
    (folder / "preprocessor_config.json").unlink()
    write_preprocessing(folder, name, **other)
    spec = image_spec(load(str(folder), None).model)
    assert (spec.size, spec.resize, spec.interpolation) == ((32, 32), resize, interpolation)
    assert spec.std == (0.2, 0.25, 0.3)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"do_normalize": False}, "do_normalize must be true"),
        ({"rescale_factor": 1}, "rescale_factor must be 1/255"),
        ({"resample": 0}, "resample 0 is neither"),
        ({"size": {"shortest_edge": 40}}, r"must be the model's 32, not \[32, 40\]"),
        ({"do_center_crop": False}, "do_center_crop must be true"),
        ({"size": {"longest_edge": 32}}, "shortest_edge"),
        ({"size": None}, "NoneType"),
    ],
)
def test_unsupported_preprocessing_is_refused(
    folder: Path, other: dict[str, Any], message: str
) -> None:
    write_preprocessing(folder, **other)
    with pytest.raises(
        ModelError, match=f"preprocessor_config.json cannot be .*{message}"
    ) as caught:
        load(str(folder), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "cannot be read"),
        ("[]", "cannot be read"),
        ({"model_type": "siglip"}, "model_type 'siglip': only clip"),
        ({}, "model_type None"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "gelu and quick_gelu"),
        ({"model_type": "clip", "text_config": {"eos_token_id": [2, 3]}}, "must be one number"),
        ({"model_type": "clip", "vision_config": {"num_channels": 4}}, "three channels"),
        ({"model_type": "clip", "text_config": {"hidden_size": "x"}}, "cannot be converted"),
    ],
)
def test_unsupported_configurations_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    text = change if isinstance(change, str) else json.dumps(change)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(tmp_path), None)
    assert "\n" not in str(caught.value)
