"""Models and weights from every source, the assumed activation, and errors for what does not fit."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeclip.storage import sha256
from tests.support.models.checkpoint_files import save_as, save_torchscript
from tests.support.models.export_models import WORDING, write_folder
from tests.support.paths import TESTS
from train.errors import ModelError
from train.models.checkpoints import Source, load, state_sha256
from train.models.weight_files import join_sha256, read_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "vit", "vit")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "open_clip_model.safetensors")


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        "state dict",
        "open_clip checkpoint",
        "training run",
        "OpenAI archive",
        "OpenAI state dict",
    ],
)
def test_weights_of_every_format(
    kind: str,
    folder: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save_as(kind, weights, tmp_path)
    source = load(str(folder), str(path))
    state = source.model.state_dict()
    tolerance = 1e-3 if kind.startswith("OpenAI") else 0  # float16
    for key, value in weights.items():
        assert state[key].dtype == torch.float32
        torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance)
    assert source.weights_sha256 == sha256(path)
    assert source.pretrained == path.name
    quick = kind.startswith("OpenAI")
    assert has_quick_gelu(source) == quick
    assert ("trained with QuickGELU: building" in capsys.readouterr().err) == quick


def test_a_folder_brings_weights_and_wording(folder: Path) -> None:
    source = load(str(folder), None)
    assert (source.name, source.pretrained) == ("vit", "open_clip_model.safetensors")
    assert source.wording == WORDING
    assert not source.model.training
    assert source.tokenizer.vocab_size == source.model.vocab_size  # bpe_path is the folder's


def test_random_weights_are_the_same_each_time(folder: Path) -> None:
    first, second = (load(str(folder), "random") for _ in range(2))
    assert first.pretrained == "random"
    assert first.weights_sha256 == second.weights_sha256
    assert first.weights_sha256 == state_sha256(first.model.state_dict())


def has_quick_gelu(source: Source) -> bool:
    quick = any(type(m).__name__ == "QuickGELU" for m in source.model.modules())
    assert source.quick_gelu == quick
    return quick


@pytest.mark.parametrize(
    ("name", "quick", "message"),
    [
        ("epoch_9.pt", False, "assuming GELU, which vit has: --quickgelu if epoch_9.pt was"),
        ("ViT-B-32-openai.pt", True, "assuming QuickGELU, for 'openai' in the name of"),
        ("b32_400m_MetaCLIP.pt", True, "assuming QuickGELU, for 'metaclip' in the name of"),
        ("vit-quickgelu.pt", True, "assuming QuickGELU, for 'quickgelu' in the name of"),
        ("dfn2b.pt", True, "assuming QuickGELU, for 'dfn' in the name of dfn2b.pt: --no-quickgelu"),
        ("DFN5B_H14.pt", True, "assuming QuickGELU, for 'dfn' in the name of DFN5B_H14.pt"),
        ("sdfnet.pt", False, "assuming GELU, which vit has: --quickgelu if sdfnet.pt was"),
        ("notopenai.pt", False, "assuming GELU, which vit has: --quickgelu if notopenai.pt was"),
    ],
)
def test_an_assumed_activation_is_reported(
    folder: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    quick: bool,
    message: str,
) -> None:
    torch.save(weights, tmp_path / name)
    assert has_quick_gelu(load(str(folder), str(tmp_path / name))) == quick
    assert message in capsys.readouterr().err
    for choice in (True, False):
        source = load(str(folder), str(tmp_path / name), quick_gelu=choice)
        assert has_quick_gelu(source) == choice
        assert "assuming" not in capsys.readouterr().err


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_activation_of_a_folder_is_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_gelu: bool
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = quick_gelu
    (tmp_path / "run" / "open_clip_config.json").write_text(json.dumps(config))
    other = tmp_path / "openai.safetensors"
    shutil.copy(folder / "open_clip_model.safetensors", other)
    for pretrained in (None, str(other)):
        assert has_quick_gelu(load(str(tmp_path / "run"), pretrained)) == quick_gelu
    assert (
        has_quick_gelu(load(str(tmp_path / "run"), None, quick_gelu=not quick_gelu)) != quick_gelu
    )
    assert "GELU" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tag", "quick"), [("openai", True), ("metaclip_400m", True), ("laion2b_s34b_b79k", False)]
)
def test_the_activation_of_a_tag_is_used(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tag: str,
    quick: bool,
) -> None:
    """Load tags of a shrunk ViT-B-32; nothing is downloaded."""
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    del config["text_cfg"]["tokenizer_kwargs"]
    config["text_cfg"]["vocab_size"] = 49408
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-B-32": config})
    model = load("ViT-B-32", "random").model
    save_file(model.state_dict(), tmp_path / "download")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: tmp_path / "download")
    source = load("ViT-B-32", tag)
    assert has_quick_gelu(source) == quick
    assert source.pretrained == tag
    message = capsys.readouterr().err
    assert "assuming" not in message
    assert ("trained with QuickGELU" in message) == quick
    assert not has_quick_gelu(load("ViT-B-32", tag, quick_gelu=False))


def half_tower(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return another image tower with bare keys, as in FARE's files."""
    return {
        key.removeprefix("visual."): value / 2
        for key, value in weights.items()
        if key.startswith("visual.")
    }


@pytest.mark.parametrize("prefix", ["", "visual.", "module.", "model.visual.", "module.visual."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_image_tower_replaces_base_weights(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path, prefix: str, wrapped: bool
) -> None:
    tower = {prefix + key: value for key, value in half_tower(weights).items()}
    path = tmp_path / "fare.pt"
    torch.save({"vision_encoder_state_dict": tower, "epoch": 2} if wrapped else tower, path)
    source = load(str(folder), None, visual=str(path))
    for key, value in source.model.state_dict().items():
        expected = weights[key] / 2 if key.startswith("visual.") else weights[key]
        assert torch.equal(value, expected)
    base = sha256(folder / "open_clip_model.safetensors")
    assert source.record == {
        "model": "vit",
        "pretrained": "open_clip_model.safetensors",
        "weights_sha256": join_sha256([base, sha256(path)]),
        "base_sha256": base,
        "visual": "fare.pt",
        "visual_sha256": sha256(path),
    }
    assert source.title == "vit, weights open_clip_model.safetensors, image encoder fare.pt"


def test_an_image_tower_has_the_bases_activation(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(half_tower(weights), tmp_path / "w.pt")
    torch.save(weights, tmp_path / "openai.pt")
    base = str(tmp_path / "openai.pt")
    assert has_quick_gelu(load(str(folder), base, visual=str(tmp_path / "w.pt")))
    save_torchscript(weights, tmp_path / "archive.pt")
    base = str(tmp_path / "archive.pt")
    assert has_quick_gelu(load(str(folder), base, visual=str(tmp_path / "w.pt")))
    assert not has_quick_gelu(load(str(folder), None, visual=str(tmp_path / "w.pt")))


def test_mismatched_image_towers_are_refused(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    tower, path = half_tower(weights), tmp_path / "w.pt"
    wrong = {key: value for key, value in tower.items() if key != "proj"}
    torch.save(wrong | {"ln_pre.bias": torch.zeros(7), "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelError) as caught:
        load(str(folder), None, visual=str(path))
    assert str(caught.value) == (
        "w.pt does not hold this model's image tower; missing: visual.proj; unknown: visual.extra; "
        "wrong shape: visual.ln_pre.bias is (7,), not (64,)"
    )
    torch.save(tower, path)
    with pytest.raises(ModelError, match="image tower alone: name it with --visual"):
        load(str(folder), str(path))
    with pytest.raises(ModelError, match="whole model: name it with --pretrained"):
        load(str(folder), None, visual=str(folder / "open_clip_model.safetensors"))
    with pytest.raises(ModelError, match=r"nothing.pt does not exist: --visual names a file"):
        load(str(folder), None, visual="nothing.pt")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("logit_scale", float("nan"), "holds infinite values or NaN, in logit_scale"),
        ("logit_scale", float("inf"), "holds infinite values or NaN, in logit_scale"),
        ("logit_scale", 1000.0, r"has the logit scale inf, exp\(1000\)"),
        ("logit_scale", -1000.0, r"has the logit scale 0, exp\(-1000\)"),
        ("visual.proj", float("nan"), "holds infinite values or NaN, in visual.proj"),
    ],
)
def test_weights_without_finite_values_are_refused(
    folder: Path,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    key: str,
    value: float,
    message: str,
) -> None:
    path = tmp_path / "w.safetensors"
    save_file(weights | {key: torch.full_like(weights[key], value)}, path)
    with pytest.raises(ModelError, match=f"w.safetensors {message}") as caught:
        load(str(folder), str(path))
    assert "\n" not in str(caught.value)


def test_weights_in_shards_of_a_folder(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "open_clip_model.safetensors").unlink()
    table = {}
    for i, key in enumerate(weights):
        name = f"open_clip_model-{i % 2 + 1:05}-of-00002.safetensors"
        table[key] = name
    for name in set(table.values()):
        save_file({k: weights[k] for k in weights if table[k] == name}, tmp_path / "run" / name)
    index = tmp_path / "run" / "open_clip_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    source = load(str(tmp_path / "run"), None)
    assert source.pretrained == index.name
    assert all(torch.equal(v, weights[k]) for k, v in source.model.state_dict().items())


def test_scalars_of_another_shape_fit(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(weights | {"logit_scale": torch.tensor([3.0])}, tmp_path / "w.safetensors")
    assert load(str(folder), str(tmp_path / "w.safetensors")).model.logit_scale.item() == 3


def test_weights_of_another_model_are_refused(
    folder: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    wrong = {key: value for key, value in weights.items() if key != "visual.proj"}
    save_file(wrong | {"ln_final.bias": torch.zeros(7), "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelError) as caught:
        load(str(folder), str(path))
    message = str(caught.value)
    assert "missing: visual.proj" in message
    assert "unknown: extra" in message
    assert "wrong shape: ln_final.bias is (7,), not (32,)" in message
    assert "\n" not in message


class Code:
    """Object that pickles as a call, which must not happen."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("pickled code was run",))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Code()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Code()))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(ModelError, match="pickled code") as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("w.safetensors", b"not safetensors at all"),
        ("w.safetensors", b""),
        ("w.pt", b""),
        ("w.pt", b"random bytes, and many of them"),
        ("w.pt", b"PK\x03\x04 the beginning of an archive"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, contents: bytes) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ModelError, match=name) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": 1}}])
def test_files_without_a_state_dict(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds no state dict"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-23", "openai", "did you mean .*ViT-B-32"),
        ("zzzzzzzz", "openai", "list_models"),
        ("ViT-B-32", None, "--pretrained is missing.*laion2b_s34b_b79k"),
        ("ViT-B/32", "no_such_tag", "neither a file nor a tag.*laion2b_s34b_b79k"),
        ("ViT-S-16", "no_such_tag", "ViT-S-16 has no tags"),
        ("tests", None, "no open_clip_config.json or config.json"),
    ],
)
def test_unknown_models_are_refused(model: str, pretrained: str | None, message: str) -> None:
    if model == "tests":
        model = str(TESTS)
    with pytest.raises(ModelError, match=message):
        load(model, pretrained)


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(config: object) -> str:
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(
        ModelError, match=r"cannot download the weights 'openai' of RN50: no network$"
    ):
        load("RN50", "openai")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not json", "no open_clip configuration"),
        ("[]", "no open_clip configuration"),
        ({"model_cfg": {}}, "no open_clip configuration"),
        ({"model_cfg": {"embed_dim": 8, "vision_cfg": {"widht": 1}, "text_cfg": {}}}, "be built"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path: Path, change: object, message: str) -> None:
    text = change if isinstance(change, str) else json.dumps(change)
    (tmp_path / "open_clip_config.json").write_text(text)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=message) as caught:
        load(str(tmp_path), "random")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has 814 text tokens, its tokenizer 49408"):
        load(str(tmp_path), "random")


def test_folders_that_lack_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ModelError, match=r"holds no open_clip_model.safetensors"):
        load(str(tmp_path), None)
    with pytest.raises(ModelError, match=r"nothing.pt does not exist"):
        load(str(tmp_path), "nothing.pt")
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded"):
        load(str(tmp_path), "random")
