"""Accuracy of a bundle on Fashion-MNIST's test images, by the runtime.

Two rows: the original images, and images recoloured on random light backgrounds
(train.data.augment.recolour, seed 0). Every image passes through edgeclip.Runtime: preprocessing, encoder
and classification.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from numpy.typing import NDArray

import edgeclip
from edgeclip.cli.command import run_command
from edgeclip.json_output import show_json
from train.data import augment, fashion_mnist

EPILOG = """examples:
  python -m benchmarks.accuracy
  python -m benchmarks.accuracy --bundle runs/fashion-bundle --purify cos
"""


def accuracy(rt: edgeclip.Runtime, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Return the share of images, uint8 (N, H, W, 3), whose most probable label is correct."""
    answers = rt.classify(list(images), top_k=1)
    return float(np.mean([answer.index == y for (answer,), y in zip(answers, labels, strict=True)]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="garments", help="bundle (default: garments)")
    parser.add_argument(
        "--purify",
        default="auto",
        choices=["auto", "none", "cos"],
        help="purification (default: auto)",
    )
    parser.add_argument("--data", default="fashion-mnist", help="data set, as name[:folder]")
    parser.add_argument("-n", type=int, help="only the first N images")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()

    split = fashion_mnist.load_split(args.data, train=False)
    rt = edgeclip.Runtime(
        args.bundle, purify=args.purify, labels=fashion_mnist.FASHION_CLASSES, batch_size=100
    )
    grey, labels = split.images[: args.n], split.labels[: args.n].numpy()
    light = augment.recolour(grey, torch.Generator().manual_seed(0))
    pictures = {
        "as they are": augment.to_rgb(grey),
        "recoloured on light backgrounds": light,
    }
    figures = {}
    for name, images in pictures.items():
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        figures[name] = accuracy(rt, pixels, labels)
    if args.json:
        show_json({"n": len(labels), "accuracy": figures}, indent=2)
        return
    for name, figure in figures.items():
        print(f"{figure:7.2%}  {len(labels)} test images, {name}")


if __name__ == "__main__":
    sys.exit(run_command(main))
