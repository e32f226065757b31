"""Pretraining: the loss against a plain loop, and runs that are killed, resumed or refused."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from train.data import fashion_mnist
from train.errors import SettingsError
from train.pretrain import Settings, contrastive_loss, draw_prompts, train
from train.run.folder import save_checkpoint

TINY = {"width": 32, "layers": 1, "text_layers": 1, "batch_size": 10, "bpe_merges": 100}


def settings(folder: Path, out: Path, **changes: object) -> Settings:
    values = TINY | {"data": f"fashion-mnist:{folder}", "out": out, "warmup_steps": 2} | changes
    return Settings(**values)


def test_contrastive_loss_equals_a_plain_loop(rng: np.random.Generator) -> None:
    images = rng.standard_normal((7, 5))
    texts = rng.standard_normal((6, 5))
    labels = np.array([0, 1, 1, 2, 0, 2, 2])
    text_labels = np.array([0, 0, 1, 1, 2, 3])  # class 3 has no image
    logits = 4.0 * images @ texts.T

    def cross_entropy(scores: np.ndarray, positive: np.ndarray) -> float:
        log_p = scores - np.log(np.exp(scores).sum())
        return -log_p[positive].mean()

    to_text = np.mean(
        [cross_entropy(s, text_labels == y) for s, y in zip(logits, labels, strict=True)]
    )
    to_image = np.mean(
        [
            cross_entropy(s, labels == y)
            for s, y in zip(logits.T, text_labels, strict=True)
            if y in labels
        ]
    )
    loss = contrastive_loss(
        *(torch.from_numpy(x) for x in (images, texts, labels, text_labels)), torch.tensor(4.0)
    )
    assert loss.item() == pytest.approx((to_text + to_image) / 2, rel=1e-6)


def test_prompts_name_every_class_in_many_ways() -> None:
    rng = random.Random(0)
    drawn = [draw_prompts(rng, 2) for _ in range(50)]
    assert all(
        len(prompts) == 20 and list(classes[::2]) == list(range(10)) for prompts, classes in drawn
    )
    sneakers = {prompt for prompts, _ in drawn for prompt in prompts[14:16]}
    assert len(sneakers) > 20
    assert any("running shoe" in prompt for prompt in sneakers)


def test_resumed_run_equals_an_uninterrupted_one(fashion_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(fashion_folder, whole, epochs=6))
    command = [sys.executable, "-m", "train.pretrain", "--data", f"fashion-mnist:{fashion_folder}"]
    command += ["--out", str(parts), "--epochs", "6", "--warmup-steps", "2"]
    for name, value in TINY.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = parts / "metrics.jsonl"
    while child.poll() is None and not (parts / "checkpoint.pt").exists():
        time.sleep(0.01)  # until the first epoch is saved
    child.kill()
    child.communicate()
    done = len(metrics.read_text().splitlines())
    assert 1 <= done < 6, "the run was to be killed half way"
    train(settings(fashion_folder, parts, epochs=6, resume=True))

    weights = [
        torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, parts)
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_run_folder_loads_in_open_clip(fashion_folder: Path, tmp_path: Path) -> None:
    train(settings(fashion_folder, tmp_path / "run", epochs=1, limit_batches=2))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'run'}")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, saved[key], rtol=0, atol=0)


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_existing_run_is_not_overwritten(fashion_folder: Path, tmp_path: Path) -> None:
    chosen = settings(fashion_folder, tmp_path / "run", epochs=1, limit_batches=1)
    train(chosen)
    before = read_files(chosen.out)
    with pytest.raises(SettingsError, match="add --resume"):
        train(replace(chosen, bpe_merges=50))
    for change, message in (
        ({"bpe_merges": 50}, "bpe-merges 100, not 50"),
        ({"learning_rate": 0.1}, "learning-rate 0.001, not 0.1"),
        ({"epochs": 2}, "epochs 1, not 2"),
        ({"seed": 1}, "seed 0, not 1"),
    ):
        with pytest.raises(SettingsError, match=f"was begun with {message}: resume it with"):
            train(replace(chosen, resume=True, **change))
    assert read_files(chosen.out) == before


def test_rows_of_metrics_after_the_checkpoint_are_dropped(
    fashion_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(fashion_folder, tmp_path / "run", epochs=1, limit_batches=2)
    train(chosen)
    metrics = chosen.out / "metrics.jsonl"
    before = metrics.read_text()
    assert json.loads(before)["step"] == 2
    with metrics.open("a") as file:
        file.write('{"step": 4, "epoch": 2}\n{"step": 6, "ep')
    train(replace(chosen, resume=True))
    assert metrics.read_text() == before


def test_resumed_run_writes_a_model_that_is_older_than_its_checkpoint(
    fashion_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(fashion_folder, tmp_path / "run", epochs=1, limit_batches=1)
    train(chosen)
    weights = chosen.out / "open_clip_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(b"older")
    train(replace(chosen, resume=True))
    assert weights.read_bytes() == before


def test_finished_model_is_not_overwritten(fashion_folder: Path, tmp_path: Path) -> None:
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "bpe.txt.gz"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(SettingsError, match="holds a model or a bundle: name another folder"):
        train(settings(fashion_folder, tmp_path, epochs=1, limit_batches=1))
    assert (tmp_path / "bpe.txt.gz").read_text() == "mine"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_run_of_another_kind_is_not_resumed(fashion_folder: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"training": {"variant": "tga"}})
    (tmp_path / "bpe.txt.gz").write_text("mine")
    with pytest.raises(SettingsError, match="holds a run of another kind"):
        train(settings(fashion_folder, tmp_path, resume=True))
    assert (tmp_path / "bpe.txt.gz").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs must be 1 or more, got 0"),
        ({"learning_rate": math.nan}, "--learning-rate must be 0 or more, got nan"),
        ({"batch_size": 151}, "fewer images than --batch-size 151: give --batch-size 150 or less"),
    ],
)
def test_wrong_settings(
    fashion_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        train(settings(fashion_folder, tmp_path / "run", **change))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_the_run(fashion_folder: Path, tmp_path: Path) -> None:
    chosen = settings(fashion_folder, tmp_path / "run", epochs=1, learning_rate=1e30)
    with pytest.raises(SettingsError, match=r"step \d+: .* is not finite: lower --learning-rate"):
        train(chosen)


def test_missing_data_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.pretrain", "--out", str(tmp_path / "run")]
    result = subprocess.run(
        [*command, "--data", f"fashion-mnist:{tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Fashion-MNIST in")
    assert result.stderr.count("\n") == 1


def test_class_names_are_the_first_synonyms() -> None:
    assert len(set(fashion_mnist.FASHION_CLASSES)) == 10
    every = [name for names in fashion_mnist.FASHION_NAMES for name in names]
    assert len(set(every)) == len(every), "one name, two classes"
