"""Runs of adversarial fine-tuning that are resumed, or split over processes and parts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.models.export_models import write_folder
from tests.support.robustness.tgazsr_runs import (
    SMALL,
    assert_same,
    command,
    distil_settings,
    rows,
    run,
    short_settings,
    weights,
)
from train import tgazsr
from train.errors import SettingsError
from train.tgazsr_settings import Settings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", "vit", **SMALL)


@pytest.fixture
def settings(model: Path, fashion_folder: Path, tmp_path: Path) -> Settings:
    return short_settings(model, fashion_folder, tmp_path / "run")


def test_killed_and_resumed_run_equals_an_uninterrupted_one(settings: Settings) -> None:
    whole = replace(settings, epochs=8, checkpoint_every=2, augment="garments")
    interrupted = replace(whole, out=settings.out.parent / "interrupted")
    child = subprocess.Popen(command(interrupted), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while child.poll() is None and not (
        (interrupted.out / "checkpoint.pt").exists() and len(rows(interrupted.out)) > 5
    ):
        time.sleep(0.005)
    child.kill()
    text = child.communicate()[0].decode()
    done = torch.load(interrupted.out / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < done < 48, f"the run was to be killed half way: {text}"
    with (interrupted.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss')  # a killed writer leaves half a row
    run(replace(interrupted, resume=True))
    run(whole)
    assert_same(interrupted.out, whole.out, rtol=0, atol=0)

    def figures(out: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out)]

    assert figures(interrupted.out) == figures(whole.out)
    board = EventAccumulator(str(whole.out / "tensorboard"))
    board.Reload()
    losses = [event.value for event in board.Scalars("loss")]
    expected = [row["loss"] for row in rows(whole.out) if "loss" in row]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_interrupted_distillation_equals_an_uninterrupted_one(
    fashion_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop in the second of two sets' epochs, between two checkpoints."""
    whole = replace(distil_settings(fashion_folder, tmp_path), checkpoint_every=3)
    interrupted = replace(whole, out=tmp_path / "interrupted")
    run(whole)

    def stop(step: int, *_: Any) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tgazsr, "check_finite", stop)
        with pytest.raises(KeyboardInterrupt):
            run(interrupted)
    assert torch.load(interrupted.out / "checkpoint.pt", weights_only=True)["step"] == 6
    moved = whole.classes.rename(tmp_path / "moved.txt")
    run(replace(interrupted, classes=moved, resume=True))
    assert_same(interrupted.out, whole.out, rtol=0, atol=0)

    again = replace(interrupted, classes=moved, resume=True)
    photos, fashion = whole.data
    for changes, message in (
        ({"data": (fashion, photos)}, r"images \[8, 150\], not \[150, 8\]"),
        ({"data": (fashion,)}, r"images \[8, 150\], not 150"),
        ({"image_size": (24,)}, r"image-size \[24, 40\], not 24"),
        ({"augment": "crop"}, "augment photographs, not crop"),
    ):
        with pytest.raises(SettingsError, match=f"was begun with {message}"):
            run(replace(again, **changes))
    moved.write_text("cat\ndog\n")
    with pytest.raises(SettingsError, match="was begun with other classes"):
        run(again)


def test_finished_run_is_left_unchanged(settings: Settings) -> None:
    run(settings)
    before = weights(settings.out)
    metrics = run(replace(settings, resume=True, workers=1))
    assert len(metrics) == 14
    assert all(torch.equal(before[key], value) for key, value in weights(settings.out).items())


@pytest.mark.parametrize(
    "variant", ["tga", *(pytest.param(v, marks=pytest.mark.slow) for v in ("at", "distil"))]
)
def test_two_processes_equal_one(
    settings: Settings, variant: str, fashion_folder: Path, tmp_path: Path
) -> None:
    one = replace(settings, variant=variant, optimizer="sgd", learning_rate=0.02, workers=1)
    if variant == "distil":
        one = replace(distil_settings(fashion_folder, tmp_path), limit_batches=6)
        one = replace(
            one, learning_rate=0.01, norm="l2", eps=0.5, step_size=0.5
        )  # no signs, which rounding can turn
    rel = 1e-3 if variant == "distil" else 1e-4  # its first losses are small differences
    two = replace(one, out=tmp_path / "two")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        words + command(two)[1:], capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "strides" not in process.stderr
    run(one)
    double_rows, single_rows = rows(two.out), rows(one.out)
    assert len(double_rows) == len(single_rows) == 14
    for double, single in zip(double_rows, single_rows, strict=True):
        for key in single.keys() - {"seconds"}:
            assert double[key] == pytest.approx(single[key], rel=rel, abs=1e-5), key
    assert_same(two.out, one.out, rtol=rel, atol=1e-5)


def test_accumulated_parts_equal_the_whole_batch(settings: Settings) -> None:
    whole = replace(settings, optimizer="sgd", learning_rate=0.02)
    accumulated = replace(whole, accumulate=3, out=settings.out.parent / "interrupted")
    run(whole)
    run(accumulated)
    assert_same(accumulated.out, whole.out, rtol=1e-4, atol=1e-5)


def test_model_and_file_are_not_overwritten(settings: Settings, model: Path) -> None:
    before = (model / "open_clip_model.safetensors").read_bytes()
    with pytest.raises(SettingsError, match="holds a model or a bundle"):
        run(replace(settings, out=model))
    assert (model / "open_clip_model.safetensors").read_bytes() == before
    with pytest.raises(SettingsError, match="is a file"):
        run(replace(settings, out=model / "bpe.txt.gz"))


def test_other_and_damaged_checkpoints_are_refused(settings: Settings) -> None:
    settings.out.mkdir()
    torch.save({"model": {}, "settings": {}}, settings.out / "checkpoint.pt")
    with pytest.raises(SettingsError, match="a run of another kind"):
        run(replace(settings, resume=True))
    (settings.out / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SettingsError, match="cannot be read"):
        run(replace(settings, resume=True))


def test_changed_data_is_refused(settings: Settings, fashion_folder: Path) -> None:
    run(replace(settings, epochs=1, batch_size=12))
    for kind in ("images-idx3", "labels-idx1"):
        test, train = (fashion_folder / f"{n}-{kind}-ubyte.gz" for n in ("t10k", "train"))
        train.write_bytes(test.read_bytes())
    with pytest.raises(SettingsError, match="was begun with images 150, not 50"):
        run(replace(settings, epochs=1, resume=True, batch_size=12))


def test_run_is_not_overwritten_or_resumed_with_other_settings(
    settings: Settings, tmp_path: Path
) -> None:
    run(replace(settings, epochs=1, limit_batches=3))
    with pytest.raises(SettingsError, match="add --resume"):
        run(settings)
    with pytest.raises(SettingsError, match="was begun with epochs 1, not 2"):
        run(replace(settings, limit_batches=3, resume=True))
    folder = write_folder(tmp_path / "other", "vit", **SMALL | {"layers": 1})
    single = replace(settings, epochs=1, limit_batches=3, model=str(folder), resume=True)
    with pytest.raises(SettingsError, match=r"was begun with (weights|model)"):
        run(single)
