"""Settings of adversarial fine-tuning: each has an effect, and bad ones are refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeclip.errors import LabelError
from tests.support.models.export_models import write_folder
from tests.support.robustness.tgazsr_runs import SMALL, command, run, short_settings, weights
from train.errors import DataError, ModelError, SettingsError
from train.run.settings import fraction, parse_settings, to_record
from train.run.settings import run as run_command
from train.tgazsr_settings import Settings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", "vit", **SMALL)


@pytest.fixture
def settings(model: Path, fashion_folder: Path, tmp_path: Path) -> Settings:
    return short_settings(model, fashion_folder, tmp_path / "run")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -0.1}, "--alpha must be 0 or more, got -0.1"),
    ({"beta": -1.0}, "--beta must be 0 or more"),
    ({"alpha": float("nan")}, "--alpha must be 0 or more, got nan"),
    ({"variant": "tecoa", "alpha": 0.1}, "has no terms"),
    ({"variant": "fare", "beta": 0.1}, "has no terms"),
    ({"image_size": (16, 16, 16)}, "names 3 sizes, one epoch or more for each: give --epochs 3"),
    ({"image_size": (24,)}, "takes no images of 24 pixels"),
    ({"eps": 8.0}, "--eps is in units of [0, 1], got 8: for 8 of 255 give --eps 8/255"),
    ({"eps": 1.0}, "give --eps 1/255"),
    ({"eps": -0.1}, "--eps must be 0 or more"),
    ({"step_size": 2.0}, "give --step-size 2/255"),
    ({"attack_steps": 0}, "--attack-steps must be 1 or more"),
    ({"gradient_clip": -1.0}, "--gradient-clip must be 0 or more"),
    ({"learning_rate": float("inf")}, "--learning-rate must be 0 or more"),
    ({"momentum": 1.0}, "--momentum must be from 0 to 0.9999"),
    ({"limit_batches": -1}, "--limit-batches must be 0 or more"),
    ({"validate_steps": -1}, "--validate-steps must be 0 or more"),
    ({"template": "a photo"}, "need {}"),
    ({"accumulate": 5}, "cannot be split over 1 processes and --accumulate 5"),
    ({"batch_size": 1000}, "fewer images than --batch-size"),
    ({"warmup_steps": 12}, "--warmup-steps 12 would never end: give --warmup-steps 1"),
    ({"learning_rate": 1e30, "optimizer": "sgd"}, "is not finite: lower --learning-rate"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run(replace(settings, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tower_without_patch_tokens_is_refused(settings: Settings, tmp_path: Path) -> None:
    resnet = write_folder(tmp_path / "resnet", "resnet")
    with pytest.raises(
        SettingsError, match=r"patch tokens in the .* and resnet has none: choose a plain ViT"
    ):
        run(replace(settings, model=str(resnet)))


# Each of these settings must change the weights.
OTHERS: list[dict[str, Any]] = [
    {"gradient_clip": 1e-3}, {"weight_decay": 5.0}, {"momentum": 0.1}, {"learning_rate": 2e-3},
    {"warmup_steps": 1}, {"attack_steps": 6}, {"eps": 0.2}, {"step_size": 0.1}, {"norm": "l2"},
    {"augment": "flip"}, {"distance": "l1"}, {"template": "the {}"}, {"precision": "bf16"},
    {"seed": 1}, {"alpha": 0.5}, {"beta": 0.5}, {"variant": "comp"}, {"optimizer": "sgd"},
    {"augment": "photographs"},
]  # fmt: skip


def test_every_setting_changes_the_weights(settings: Settings) -> None:
    base = replace(settings, limit_batches=2, validate=0, learning_rate=1e-3)

    def trained(name: str, **changes: Any) -> torch.Tensor:
        run_settings = replace(base, out=settings.out.parent / name, **changes)
        run(run_settings)
        return torch.cat([value.ravel() for value in weights(run_settings.out).values()])

    expected = trained("base")
    assert torch.equal(trained("again"), expected)
    for i, changes in enumerate(OTHERS):
        assert not torch.allclose(trained(str(i), **changes), expected, atol=1e-7), changes


def test_broken_image_in_a_worker_is_one_line(
    tmp_path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(b"broken")
    run_settings = replace(
        settings, data=(f"folder:{tmp_path / 'photos'}",), batch_size=2, workers=1, validate=0
    )
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: run(run_settings))
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: image ")
    assert "photos" in line


def test_classes_without_the_labels_of_the_data(settings: Settings, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    for changes in ({}, {"variant": "distil", "beta": 0.1}):
        with pytest.raises(SettingsError, match=r"--classes lacks '.*' and 9 others: add every"):
            run(replace(settings, classes=names, **changes))
    names.write_text("cat\ndog | a {} that barks\n")
    with pytest.raises(SettingsError, match="has prompts of 'dog': leave the names alone"):
        run(replace(settings, classes=names, variant="distil"))
    with pytest.raises(LabelError, match=r"gone\.txt: No such file"):
        run(replace(settings, classes=tmp_path / "gone.txt"))


def test_weights_of_another_architecture_are_refused(settings: Settings, tmp_path: Path) -> None:
    wide = write_folder(tmp_path / "wide", "vit", **SMALL | {"width": 64})
    file = wide / "open_clip_model.safetensors"
    with pytest.raises(ModelError, match="does not hold this model's weights"):
        run(replace(settings, pretrained=str(file)))


def test_folder_without_classes_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders in"):
        run(replace(settings, data=(f"folder:{tmp_path / 'empty'}",)))


def test_command_line_errors_are_one_line(settings: Settings) -> None:
    process = subprocess.run(
        command(settings, "--eps", "8"), capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    expected = "error: --eps is in units of [0, 1], got 8: for 8 of 255 give --eps 8/255\n"
    assert process.stderr == expected


@pytest.mark.parametrize(
    ("words", "expected"), [([], None), (["--quickgelu"], True), (["--no-quickgelu"], False)]
)
def test_activation_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: bool | None
) -> None:
    monkeypatch.setattr(sys, "argv", ["tgazsr", "--data", "x", "--out", "y", *words])
    assert parse_settings(Settings, "tgazsr", "", "").quickgelu is expected


def test_fractions_of_decimals() -> None:
    assert [fraction(text) for text in ("0.03", "8/255", "1.2/255", "2")] == [
        0.03, 8 / 255, pytest.approx(1.2 / 255, rel=1e-15), 2.0,
    ]  # fmt: skip
    for wrong in ("1/2/3", "8/", "/255", "8/0", "eight", "1/nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number such as 8/255"):
            fraction(wrong)


def test_repeated_options_and_sizes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parsed(*words: str) -> Settings:
        monkeypatch.setattr(sys, "argv", ["tgazsr", "--out", "y", *words])
        return parse_settings(Settings, "tgazsr", "", "")

    assert parsed("--data", "a").data == ("a",)
    assert parsed("--data", "a", "--data", "folder:b,c").data == ("a", "folder:b,c")
    assert parsed("--data", "a").image_size is None
    assert parsed("--data", "a", "--image-size", "160").image_size == (160,)
    assert parsed("--data", "a", "--image-size", "128,160").image_size == (128, 160)
    assert to_record(parsed("--data", "a", "--image-size", "160")) == (
        to_record(parsed("--data", "a")) | {"image_size": 160}
    )
    assert to_record(parsed("--data", "a"))["data"] == "a"
    assert to_record(parsed("--data", "a", "--data", "b"))["data"] == ["a", "b"]
    for wrong in ("0", "160,", "big"):
        with pytest.raises(SystemExit):
            parsed("--data", "a", "--image-size", wrong)
        assert "expected sizes such as 160 or 128,160" in capsys.readouterr().err
