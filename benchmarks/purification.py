"""Cost of purification: time per image and peak memory, for none, CLIPure-Cos and CLIPure-Diff.

All take turns in one run on one bundle. The weights are random, which does not change the time. The peer
of CLIPure-Diff is its published loop in PyTorch: each of the ten steps passes all 81 tokens through the
prior, forward and backward.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import edgeclip
from benchmarks.common import add_model, build_parser
from benchmarks.timing import machine, medians_ms, process
from edgeclip import storage
from edgeclip.backends.prior import Prior
from edgeclip.cli.command import run_command
from edgeclip.json_output import to_json
from edgeclip.purify import DiffPurifier
from train.models.prior import DiffusionPrior, Shape
from train.models.trained_prior import load_prior
from train.robustness.purification import NullPrior, purify

EPILOG = """examples:
  python -m benchmarks.purification
  python -m benchmarks.purification --model ViT-B-16 --depth 6 --heads 8 --json purification.json

The default is the size of the public prior for ViT-L-14. Its export takes minutes, 3 GB of disk and
8 GB of memory, and is kept in build/benchmarks.
"""
FOLDER = Path("build/benchmarks")
IMAGE = "examples/ankle-boot.png"
LABELS = "examples/labels.txt"
METHODS = ("none", "cos", "diff")
BATCHES = (1, 4)


def bundle_for(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return a bundle with a random prior, and the prior's weights, making both once."""
    name = f"{args.model}-prior-{args.depth}x{args.heads}"
    folder, weights = FOLDER / name, FOLDER / f"{name}.safetensors"
    if (folder / "manifest.json").is_file() and weights.is_file():
        return folder, weights
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    prior = DiffusionPrior(Shape(args.dim, args.depth, args.heads))
    with storage.draft(weights) as part:
        save_file({k: v.clone() for k, v in prior.state_dict().items()}, part)
    command = [sys.executable, "-m", "export", args.model, "--pretrained", "random", "--force"]
    command += ["--prior", str(weights), "-o", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder, weights


def measure_classify(bundle: Path, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Return milliseconds per image from pixels to an answer, by batch and method."""
    runtimes = {
        name: edgeclip.Runtime(bundle, purify=name, batch_size=max(BATCHES)) for name in METHODS
    }
    rt = runtimes["none"]
    labels = edgeclip.LabelSet.random(args.labels, rt.bundle.null_text, rt.text_identity())
    pixels = runtimes["none"].preprocess([IMAGE] * max(BATCHES))
    per_image = {}
    for count in BATCHES:
        calls = {
            name: partial(rt.classify_pixels, pixels[:count], labels)
            for name, rt in runtimes.items()
        }
        per_image[count] = {
            k: ms / count for k, ms in medians_ms(calls, args.repeats, rounds=1, warm_up=1).items()
        }
    return per_image


def measure_diff(bundle: Path, weights: Path, repeats: int) -> dict[str, float]:
    """Return milliseconds of the ten steps alone for one image, by edgeclip and by PyTorch."""
    opened = edgeclip.Bundle(bundle)
    spec, dim = opened.manifest.prior, opened.manifest.embed_dim
    assert spec is not None, "bundle_for exports a prior"
    ours = Prior(opened.graph(spec.file), dim, device="cpu")
    prior = load_prior(weights).model
    random = torch.Generator().manual_seed(0)
    text, tokens = torch.randn(1, dim, generator=random), torch.randn(1, 77, dim, generator=random)
    purifier = DiffPurifier()

    class WholeText(NullPrior):
        """Prior that processes the text again in each step, for each image."""

        def gradient(self, unit: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
            """Return the gradient of the loss, (N, D)."""
            count = len(unit)
            times = torch.full((count,), timestep)
            texts = text.expand(count, -1), tokens.expand(count, -1, -1)
            state = dim**0.5 * unit, times, noise.expand_as(unit)
            return prior.loss_and_grad(*state, *texts)[1]

    with torch.no_grad():
        peer = WholeText(prior, prior.context(text, tokens))
    row = np.random.default_rng(0).standard_normal((1, dim), np.float32)
    row /= np.linalg.norm(row)
    null = torch.zeros(dim)

    def in_pytorch() -> torch.Tensor:
        with torch.no_grad():
            return purify(torch.from_numpy(row), null, purifier, "released", peer)

    calls: dict[str, Callable[[], object]] = {
        "edgeclip": partial(ours.purify, row, purifier),
        "PyTorch": in_pytorch,
    }
    return medians_ms(calls, repeats, rounds=1, warm_up=1)


def measure_processes(bundle: Path, repeats: int) -> dict[str, tuple[float, float]]:
    """Return wall time in ms and peak memory in MB of `edgeclip classify`, by method."""
    command = [sys.executable, "-m", "edgeclip", "classify", IMAGE, "--labels", LABELS]
    command += ["--bundle", str(bundle), "--purify"]
    process([*command, "none"], 1)  # caches the labels
    return {name: process([*command, name], repeats) for name in METHODS}


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add = parser.add_argument
    add_model(parser, "ViT-L-14")
    add("--dim", type=int, default=768, help="width of its embeddings (default: 768)")
    add("--depth", type=int, default=24, help="number of layers of the prior (default: 24)")
    add("--heads", type=int, default=32, help="attention heads of the prior (default: 32)")
    add("--labels", type=int, default=1000, help="number of classes (default: 1000)")
    add("--repeats", type=int, default=3, help="runs of each call (default: 3)")
    args = parser.parse_args()

    bundle, weights = bundle_for(args)
    classified = measure_classify(bundle, args)
    alone = measure_diff(bundle, weights, args.repeats)
    processes = measure_processes(bundle, 1)
    versions = {p: version(p) for p in ("edgeclip", "onnxruntime", "torch")}
    prior = Shape(args.dim, args.depth, args.heads)
    count = sum(p.numel() for p in DiffusionPrior(prior).parameters())
    print(f"{args.model}, {args.labels} labels, 10 steps of 30; prior of {count:,} parameters")
    print(machine() + "; " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    print("\n| purification | ms per image | at batch 4 | process, ms | peak memory, MB |")
    print("|---|---|---|---|---|")
    for name in METHODS:
        ms = " | ".join(f"{classified[size][name]:.1f}" for size in BATCHES)
        print(f"| {name} | {ms} | {processes[name][0]:.0f} | {processes[name][1]:.0f} |")
    ours, theirs = alone["edgeclip"], alone["PyTorch"]
    print("\n| ten steps of CLIPure-Diff alone | ms | ratio |\n|---|---|---|")
    print(
        f"| edgeclip | {ours:.0f} | |\n| PyTorch, all tokens | {theirs:.0f} | {theirs / ours:.1f} |"
    )
    if args.json:
        report = {"machine": machine(), "versions": versions, "model": args.model}
        report |= {"prior": vars(prior) | {"parameters": count}, "labels": args.labels}
        report |= {"repeats": args.repeats, "classify": classified, "diff": alone}
        report["process"] = {k: {"ms": v[0], "mb": v[1]} for k, v in processes.items()}
        storage.write(args.json, to_json(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
