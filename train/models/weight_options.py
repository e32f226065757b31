"""Options of a command line that name a model's weights; PyTorch is not imported."""

from __future__ import annotations

import argparse


def add_weight_options(parser: argparse.ArgumentParser, of: str = "") -> None:
    """Add --pretrained, --visual and --quickgelu; `of`, as in "the original's ", begins their helps."""
    parser.add_argument(
        "--pretrained",
        metavar="TAG_OR_FILE",
        help=f"{of}weights: a tag of open_clip's, a file (safetensors, checkpoint, TorchScript; see "
        "docs/checkpoints.md), FILE#KEY for one of several state dicts in it, or random for "
        "benchmarks; a folder brings its own",
    )
    parser.add_argument(
        "--visual",
        metavar="FILE",
        help=f"{of}weights of the image tower alone (FARE, TeCoA), put over those of --pretrained",
    )
    parser.add_argument(
        "--quickgelu",
        action=argparse.BooleanOptionalAction,
        help=f"{of}activation: QuickGELU or GELU (default: as the weights were trained, as far as "
        "that is known; what is assumed is printed)",
    )
