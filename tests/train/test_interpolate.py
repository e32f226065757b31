"""Interpolation of two encoders: the arithmetic, the run and the sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.models.export_models import write_folder
from train import interpolate
from train.errors import SettingsError
from train.interpolate import build_parser
from train.models.checkpoints import load

SMALL = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Write two models that differ in the image encoder alone, as before and after fine-tuning."""
    folders = [write_folder(tmp_path / str(i), "vit", **SMALL) for i in range(2)]
    weights = folders[1] / "open_clip_model.safetensors"
    rng = torch.Generator().manual_seed(0)
    state = {
        key: value + 0.1 * torch.randn(value.shape, generator=rng) if "visual" in key else value
        for key, value in load_file(weights).items()
    }
    save_file(state, weights)
    return [str(folder) for folder in folders]


def half_tower(folder: str, path: Path) -> Path:
    """Write a file with another image tower alone, as FARE publishes."""
    state = load_file(Path(folder) / "open_clip_model.safetensors")
    tower = {k.removeprefix("visual."): v / 2 for k, v in state.items() if k.startswith("visual.")}
    torch.save(tower, path)
    return path


def run(arguments: list[str]) -> None:
    """Run the command line in this process."""
    interpolate.main(build_parser().parse_args(arguments))


@pytest.mark.parametrize("alpha", ["0", "1", "1/4"])
def test_run_holds_the_weights_between(pair: list[str], tmp_path: Path, alpha: str) -> None:
    out = tmp_path / "out"
    run([*pair, "--alpha", alpha, "--out", str(out)])
    share = eval(alpha)  # a constant of this test
    first, second, between = (load(str(f), None) for f in (*pair, out))
    states = [source.model.state_dict() for source in (first, second, between)]
    for key, value in states[2].items():
        expected = (1 - share) * states[0][key].double() + share * states[1][key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    record = json.loads((out / "open_clip_config.json").read_text())["interpolation"]
    assert record["alpha"] == pytest.approx(share)
    assert record["weights_sha256"]["robust"] == second.weights_sha256
    assert between.config["model_cfg"] == second.config["model_cfg"]
    assert between.wording["templates"] == second.wording["templates"]
    assert between.tokenizer(["a cat"]).tolist() == second.tokenizer(["a cat"]).tolist()
    with pytest.raises(SettingsError, match="holds a model already"):
        run([*pair, "--alpha", alpha, "--out", str(out)])


def test_run_has_the_text_tower_of_transformers(tmp_path: Path) -> None:
    folders = [str(write_folder(tmp_path / str(i), "bert")) for i in range(2)]
    run([*folders, "--alpha", "1/2", "--out", str(tmp_path / "out")])
    first, between = load(folders[0], None), load(str(tmp_path / "out"), None)
    ids = first.tokenizer(["a dog"])
    assert torch.equal(between.tokenizer(["a dog"]), ids)
    assert torch.equal(between.model.encode_text(ids), first.model.encode_text(ids))


def test_sweep(
    pair: list[str], fashion_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frontier"
    arguments = [*pair, "--sweep", "--points", "3", "--data", f"fashion-mnist:{fashion_folder}"]
    run([*arguments, "--eps", "2/255", "--steps", "2", "-n", "20", "--out", str(out)])
    result = json.loads((out / "frontier.json").read_text())
    assert [row["alpha"] for row in result["results"]] == [0, 0.5, 1]
    for row in result["results"]:
        assert 0 <= row["robust_accuracy"] <= row["clean_accuracy"] <= 1
    with Image.open(out / "frontier.png") as picture:
        assert picture.width > 500
    text = capsys.readouterr().out
    assert "eps 2/255" in text
    assert f"{result['results'][1]['clean_accuracy']:.1%}" in text


def test_bad_settings(pair: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SettingsError, match=r"--alpha must be from 0 to 1, got 1\.5"):
        run([*pair, "--alpha", "1.5", *out])
    with pytest.raises(SettingsError, match="--sweep needs --data and --eps"):
        run([*pair, "--sweep", *out])
    with pytest.raises(SettingsError, match="for 8 of 255 give --eps 8/255"):
        run([*pair, "--sweep", "--data", "fashion-mnist", "--eps", "8", *out])
    stranger = write_folder(tmp_path / "stranger", "vit", seed=5, **SMALL)
    with pytest.raises(SettingsError, match="the two text encoders differ"):
        run([pair[0], str(stranger), "--alpha", "0.5", *out])
    with pytest.raises(SettingsError, match="--points must be 2 or more"):
        run([*pair, "--sweep", "--data", "fashion-mnist", "--eps", "0.1", "--points", "1", *out])
    with pytest.raises(SettingsError, match="is a file"):
        run([*pair, "--alpha", "0.5", "--out", pair[0] + "/bpe.txt.gz"])
    other = write_folder(tmp_path / "other", "vit", **SMALL | {"layers": 2})
    with pytest.raises(SettingsError, match="of different architectures: see visual"):
        run([pair[0], str(other), "--alpha", "0.5", *out])


def test_original_with_another_image_tower(pair: list[str], tmp_path: Path) -> None:
    tower, out = half_tower(pair[0], tmp_path / "fare.pt"), tmp_path / "out"
    run([*pair, "--visual", str(tower), "--alpha", "0", "--out", str(out)])
    mixed, original = load(str(out), None).model.state_dict(), load(pair[0], None).model
    for key, value in original.state_dict().items():
        assert torch.equal(mixed[key], value / 2 if key.startswith("visual.") else value)


def test_different_activations_are_refused(pair: list[str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="one of the two models has QuickGELU"):
        run([*pair, "--quickgelu", "--alpha", "0", "--out", str(tmp_path / "out")])
