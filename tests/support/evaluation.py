"""Runs of train.evaluate in this process."""

from __future__ import annotations

import json
from typing import Any

from train import evaluate
from train.evaluate import build_parser


def run(words: list[str], *more: str) -> dict[str, Any]:
    """Run train.evaluate and return the contents of its result file."""
    args = build_parser().parse_args([*words, *more])
    evaluate.main(args)
    return json.loads(args.out.read_text())
