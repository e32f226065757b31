"""Command-line options for a model's weights; imports no PyTorch."""

from __future__ import annotations

import argparse


def add_weight_options(parser: argparse.ArgumentParser, owner: str = "") -> None:
    """Add --pretrained, --visual and --quickgelu.

    owner: opening of each help text where a command has several models, such as "the original's ".
    """
    parser.add_argument(
        "--pretrained",
        metavar="TAG_OR_FILE",
        help=f"{owner}weights: an open_clip tag, a file (safetensors, checkpoint, TorchScript; see "
        "docs/checkpoints.md), FILE#KEY for one of its state dicts, or random for benchmarks "
        "(default: the weights in the model's folder)",
    )
    parser.add_argument(
        "--visual",
        metavar="FILE",
        help=f"{owner}image tower weights (FARE, TeCoA), loaded over those of --pretrained",
    )
    parser.add_argument(
        "--quickgelu",
        action=argparse.BooleanOptionalAction,
        help=f"{owner}activation: QuickGELU or GELU (default: the one the weights were trained "
        "with, as far as known; assumptions are printed)",
    )
