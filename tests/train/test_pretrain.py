"""Pretraining: the loss against a plain loop, and a run that stops and goes on."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from train.data import fashion_mnist
from train.errors import SettingsError
from train.pretrain import Settings, contrastive_loss, draw_prompts, learning_rate, main
from train.run.folder import Metrics, save_checkpoint, write_small_bpe

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
    found = contrastive_loss(
        *(torch.from_numpy(x) for x in (images, texts, labels, text_labels)), torch.tensor(4.0)
    )
    assert found.item() == pytest.approx((to_text + to_image) / 2, rel=1e-6)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    chosen = Settings(data="", out=Path(), learning_rate=0.5, warmup_steps=10)
    rates = [learning_rate(step, 100, chosen) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == 0.5
    assert rates[54] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 44 / 90)))
    assert rates[-1] < 1e-3
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_prompts_name_every_class_in_many_ways() -> None:
    rng = random.Random(0)
    drawn = [draw_prompts(rng, 2) for _ in range(50)]
    assert all(
        len(prompts) == 20 and list(classes[::2]) == list(range(10)) for prompts, classes in drawn
    )
    sneakers = {prompt for prompts, _ in drawn for prompt in prompts[14:16]}
    assert len(sneakers) > 20
    assert any("running shoe" in prompt for prompt in sneakers)


def test_small_bpe_encodes_any_text(tmp_path: Path) -> None:
    small = write_small_bpe(tmp_path / "bpe.txt.gz", 100)
    assert small.vocab_size == 512 + 100 + 2
    for text in ("a photo of a sneaker.", "Käse 猫 🐈", ""):
        ids = small.encode(text)
        assert max(ids, default=0) < small.vocab_size - 2
        assert small.decode(ids).replace(" ", "") == text.lower().replace(" ", "")
    whole = write_small_bpe(tmp_path / "all.txt.gz", 49152 - 512 - 2 + 256)
    assert whole.encode("a photo of a sneaker") == open_clip.SimpleTokenizer().encode(
        "a photo of a sneaker"
    )


def test_resumed_run_equals_an_uninterrupted_one(fashion_folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(settings(fashion_folder, whole, epochs=12))
    command = [sys.executable, "-m", "train.pretrain", "--data", f"fashion-mnist:{fashion_folder}"]
    command += ["--out", str(parts), "--epochs", "12", "--warmup-steps", "2"]
    for name, value in TINY.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = parts / "metrics.jsonl"
    while child.poll() is None and not (parts / "checkpoint.pt").exists():
        time.sleep(0.01)  # until the first epoch is saved
    child.kill()
    child.communicate()
    done = len(metrics.read_text().splitlines())
    assert 1 <= done < 12, "the run was to be killed half way"
    main(settings(fashion_folder, parts, epochs=12, resume=True))

    weights = [
        torch.load(run / "checkpoint.pt", weights_only=True)["model"] for run in (whole, parts)
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows][-2:] == [11, 12]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_run_folder_loads_in_open_clip(fashion_folder: Path, tmp_path: Path) -> None:
    main(settings(fashion_folder, tmp_path / "run", epochs=1, limit_batches=2))
    model = open_clip.create_model(f"local-dir:{tmp_path / 'run'}")
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, saved[key], rtol=0, atol=0)


def test_existing_run_is_not_overwritten(fashion_folder: Path, tmp_path: Path) -> None:
    chosen = settings(fashion_folder, tmp_path / "run", epochs=1, limit_batches=1)
    main(chosen)
    with pytest.raises(SettingsError, match="add --resume"):
        main(chosen)


def test_finished_model_is_not_overwritten(fashion_folder: Path, tmp_path: Path) -> None:
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "bpe.txt.gz"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(SettingsError, match="holds a finished model: name another folder"):
        main(settings(fashion_folder, tmp_path, epochs=1, limit_batches=1))
    assert (tmp_path / "bpe.txt.gz").read_text() == "mine"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_files_of_a_run_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt.part").write_text("mine")
    path = tmp_path / "checkpoint.pt"
    for _ in range(2):
        save_checkpoint(tmp_path, {"weights": torch.ones(3)})
        path.chmod(0o600)
    first = path.read_bytes()
    with pytest.raises(AttributeError):  # of what cannot be pickled
        save_checkpoint(tmp_path, {"weights": lambda: None})
    assert path.read_bytes() == first
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "checkpoint.pt.part").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2
    save_checkpoint(tmp_path, {"weights": torch.ones(3)})
    assert path.read_bytes() == first  # no name of a temporary file in it


def test_figures_that_are_not_finite_are_json(tmp_path: Path) -> None:
    with closing(Metrics(tmp_path, 0)) as metrics:
        metrics.write({"step": 1, "loss": math.nan})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None}


def test_missing_data_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.pretrain", "--out", str(tmp_path / "run")]
    found = subprocess.run(
        [*command, "--data", f"fashion-mnist:{tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stderr.startswith("error: no Fashion-MNIST in")
    assert found.stderr.count("\n") == 1


def test_class_names_are_the_first_synonyms() -> None:
    assert len(set(fashion_mnist.FASHION_CLASSES)) == 10
    every = [name for names in fashion_mnist.FASHION_NAMES for name in names]
    assert len(set(every)) == len(every), "one name, two classes"
