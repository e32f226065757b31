"""Models with text towers of Hugging Face transformers, against open_clip and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.models.export_models import write_folder
from tests.support.texts import AWKWARD
from train.errors import ModelError
from train.models.checkpoints import load
from train.progress import quiet
from train.run.folder import copy_tokenizer, save_model

PROMPTS = ["", "a small dog", "two cats [PAD] <pad> and [MASK] <mask>", "many words " * 50]
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "bert", "bert")


def open_clips(folder: Path) -> tuple[Any, Any]:
    """Return open_clip's own model and tokenizer of a folder, as docs/checkpoints.md says."""
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.chdir(folder)
        model, _ = open_clip.create_model_from_pretrained("local-dir:.")
        return model.eval(), open_clip.get_tokenizer("local-dir:.")


def changed(folder: Path, target: Path, **text: Any) -> Path:
    """Copy a model's folder and change its text_cfg."""
    shutil.copytree(folder, target)
    config = json.loads((target / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= text
    (target / "open_clip_config.json").write_text(json.dumps(config))
    return target


@torch.no_grad()
def check_same(folder: Path, model: Any, tokenizer: Any) -> None:
    """Check that a folder holds this model, by our loader and by open_clip's."""
    source = load(str(folder), None)
    for other, other_tokenizer in ((source.model, source.tokenizer), open_clips(folder)):
        ids = tokenizer(AWKWARD + PROMPTS)
        assert torch.equal(other_tokenizer(AWKWARD + PROMPTS), ids)
        expected = model.encode_text(ids[-4:])
        torch.testing.assert_close(other.encode_text(ids[-4:]), expected, rtol=0, atol=1e-6)


def test_a_folder_is_open_clips(folder: Path) -> None:
    check_same(folder, *open_clips(folder))


@torch.no_grad()
def test_embeddings_are_means_of_transformers_hidden_states(bert: Path) -> None:
    source, text = load(str(bert), None), bert / "text"
    state = {
        key.removeprefix("text.transformer."): value
        for key, value in load_file(bert / WEIGHTS).items()
        if key.startswith("text.transformer.")
    }
    with quiet():
        config = transformers.BertConfig.from_pretrained(text)
        reference = transformers.BertModel(config, add_pooling_layer=False).eval()
    reference.load_state_dict(state)
    tokenizer = transformers.AutoTokenizer.from_pretrained(text)
    for prompt in ("", "a small dog", "two red cats: 42"):
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = reference(**inputs).last_hidden_state.mean(dim=1)
        actual = source.model.encode_text(source.tokenizer(prompt))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_run_is_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Save and reload as train.tgazsr and train.interpolate do."""
    source, run = load(str(folder), None), tmp_path / "run"
    run.mkdir()
    for _ in range(2):  # again, when a run is resumed
        copy_tokenizer(source, run)
    save_model(run, source.model, source.config)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (run / "text").iterdir()}
    check_same(run, source.model, source.tokenizer)
    assert load(str(run), None).config == source.config


def test_a_named_model_becomes_a_folder(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load open_clip's model of a name, whose tower is named by a path instead of the hub's name."""
    config = json.loads((bert / "open_clip_config.json").read_text())["model_cfg"]
    name = str(bert / "text")
    config["text_cfg"] = {"hf_model_name": name, "hf_tokenizer_name": name, "context_length": 24}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"roberta-ViT-B-32": config})
    source, run = load("roberta-ViT-B-32", "random"), tmp_path / "run"
    assert source.config["model_cfg"]["text_cfg"]["hf_model_name"] == "text"
    run.mkdir()
    copy_tokenizer(source, run)
    save_model(run, source.model, source.config)
    check_same(run, source.model, source.tokenizer)


@pytest.mark.parametrize("name", ["towers/small", "text"])
def test_relative_names_are_folders_of_the_model(bert: Path, tmp_path: Path, name: str) -> None:
    settings = {"hf_model_name": name, "hf_tokenizer_name": name, "tokenizer_kwargs": {}}
    model = changed(bert, tmp_path / "model", **settings)
    (model / "text").rename(tmp_path / "text")
    (model / name).parent.mkdir(exist_ok=True)
    (tmp_path / "text").rename(model / name)
    actual, expected = load(str(model), None), load(str(bert), None)
    assert torch.equal(actual.tokenizer(PROMPTS), expected.tokenizer(PROMPTS))
    states = actual.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


def test_position_ids_of_old_weights_are_left_out(bert: Path) -> None:
    weights = load_file(bert / WEIGHTS)
    old = bert.parent / "old.safetensors"
    save_file(weights | {"text.transformer.embeddings.position_ids": torch.arange(40)[None]}, old)
    state = load(str(bert), str(old)).model.state_dict()
    assert state.keys() == weights.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 41}, r"cannot encode a text of 41 tokens \(.*\): see context_length"),
        ({"hf_pooler_type": "max_pooler"}, r"cannot encode a text of 24 tokens \(.*boolean"),
        ({"hf_pooler_type": "odd"}, "cannot be built: odd|cannot be built: 'odd'"),
    ],
)
def test_settings_that_open_clip_cannot_run(
    bert: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load(str(changed(bert, tmp_path / "model", **settings)), None)
    assert "\n" not in str(caught.value)


def test_a_model_without_its_text_folder(bert: Path, tmp_path: Path) -> None:
    model = changed(bert, tmp_path / "model")
    shutil.rmtree(model / "text")
    with pytest.raises(ModelError, match="lacks the folder text, with"):
        load(str(model), None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd"}}, "no text tower 'odd', but"),
        ({}, "no text tower None, but roberta"),
        ({"model_type": "bert", "vocab_size": 50}, "has 50 text tokens, its tokenizer"),
        ({"model_type": "bert", "pad_token_id": None}, "a text tower without pad_token_id"),
    ],
)
def test_towers_that_open_clip_cannot_run(
    bert: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    model = changed(bert, tmp_path / "model")
    path = model / "text" / "config.json"
    if config.get("model_type") == "bert":
        config = json.loads(path.read_text()) | config
    path.write_text(json.dumps(config))
    (model / "text" / "code.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(ModelError, match=message) as caught:
        load(str(model), "random")
    assert "\n" not in str(caught.value)


def test_tokenizers_run_no_code_of_their_files(bert: Path, tmp_path: Path) -> None:
    model = changed(
        bert,
        tmp_path / "model",
        tokenizer_kwargs={"subfolder": "text", "trust_remote_code": True},
    )
    path = model / "text" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "Odd"}
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["code.Odd", "code.Odd"]}}))
    (model / "text" / "code.py").write_text("raise SystemExit('code was run')")
    load(str(model), "random")  # tokenizer.json alone
