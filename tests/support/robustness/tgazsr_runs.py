"""Short runs of train.tgazsr on a tiny CLIP and a few images."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support.models.export_models import folder_of_images, write_folder
from train import tgazsr
from train.tgazsr_settings import Settings, checked

CPU = torch.device("cpu")
SMALL = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4}


def short_settings(model: Path, fashion_folder: Path, out: Path) -> Settings:
    """Return settings of a run of two epochs."""
    return Settings(
        data=(f"fashion-mnist:{fashion_folder}",),
        out=out,
        model=str(model),
        eps=8 / 255,
        step_size=4 / 255,
        epochs=2,
        batch_size=24,
        optimizer="adamw",
        learning_rate=1e-3,
        warmup_steps=2,
        validate=20,
        validate_steps=2,
        device="cpu",
        threads=1,
    )


def distil_settings(fashion_folder: Path, folder: Path) -> Settings:
    """Return settings of adversarial distillation by a convolutional tower, on two sets.

    The first set has eight photographs, whose classes are not among those of the file of names.
    """
    tower = {"timm_model_name": "test_efficientnet", "image_size": 32}
    model = write_folder(folder / "convolutional", "convnext", **tower)
    folder_of_images(folder / "photos")
    names = folder / "names.txt"
    names.write_text("cat\ndog\n# a comment\n\nhot air balloon\n")
    return replace(
        short_settings(model, fashion_folder, folder / "distilled"),
        data=(f"folder:{folder / 'photos' / 'test'}", f"fashion-mnist:{fashion_folder}"),
        variant="distil",
        classes=names,
        augment="photographs",
        image_size=(24, 40),
        attack_steps=1,
        optimizer="sgd",
        learning_rate=0.05,
        limit_batches=4,
    )


def run(settings: Settings) -> list[dict[str, Any]]:
    """Train in this process; return the rows of metrics."""
    tgazsr.train(checked(settings, 1), 0, 1, CPU)
    return rows(settings.out)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def command(settings: Settings, *more: str) -> list[str]:
    """Return the command line of a run; its defaults are left out."""
    words = [sys.executable, "-m", "train.tgazsr"]
    defaults = Settings(data=(), out=Path())
    for data in settings.data:
        words += ["--data", data]
    for name, value in vars(replace(settings, data=())).items():
        if value != getattr(defaults, name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{name.replace('_', '-')}", text]
    return [*words, *more]


def assert_same(out: Path, reference: Path, **tolerance: float) -> None:
    actual, expected = weights(out), weights(reference)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, **tolerance)
