"""Runs of train.evaluate in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from train import evaluate
from train.evaluate import build_parser

SMALL = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}


def command(subject: Path, fashion_folder: Path, out: Path) -> list[str]:
    """Return arguments of an evaluation without checks, which other tests cover."""
    line = f"{subject} --data fashion-mnist:{fashion_folder} --eps 4/255 --steps 3 -n 40"
    line += " --batch-size 16 --queries 20 --check-samples 0 --device cpu"
    return [*line.split(), "--out", str(out)]


def run(arguments: list[str], *more: str) -> dict[str, Any]:
    """Run train.evaluate and return the contents of its result file."""
    args = build_parser().parse_args([*arguments, *more])
    evaluate.main(args)
    return json.loads(args.out.read_text())


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


def marks(result: dict[str, Any], *keys: str) -> np.ndarray:
    """Return the marks of attacks, by default of all, bool (attacks, images)."""
    rows = [result["samples"][key] for key in keys or result["samples"]]
    return np.array([[mark == "1" for mark in row] for row in rows])
