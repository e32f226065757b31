"""Models, peers and command-line arguments that benchmarks share."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

import edgeclip
from edgeclip.bundle import MANIFEST
from edgeclip.manifest import SCHEMA_VERSION
from edgeclip.precisions import PRECISIONS

STEPS, STEP_SIZE = 10, 30.0  # CLIPure-Cos as published
MATRIX = 2048  # rows of the matrix product whose rate is the limit
EXPORTED = ("fp32", "int8")  # precisions of bundles that benchmarks export, unless they name others

Report = dict[str, Any]  # what a benchmark writes as JSON


class Purification(TypedDict):
    """Arguments of `_core.classify` that purify."""

    null_text: NDArray[np.float32]
    null_scores: NDArray[np.float32]
    steps: int
    step_size: float


def published_purification(
    null_text: NDArray[np.float32], null_scores: NDArray[np.float32]
) -> Purification:
    """Return CLIPure-Cos as published, as arguments of `_core.classify`."""
    return {
        "null_text": null_text,
        "null_scores": null_scores,
        "steps": STEPS,
        "step_size": STEP_SIZE,
    }


def build_parser(description: str | None, epilog: str) -> argparse.ArgumentParser:
    """Return a parser of --json, which keeps the line breaks of description and epilog."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser


def add_model(parser: argparse.ArgumentParser, default: str = "ViT-B-32") -> None:
    """Add --model to a parser."""
    parser.add_argument(
        "--model",
        default=default,
        help=f"open_clip model, with random weights (default: {default})",
    )


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    """Add --repeats to a parser."""
    parser.add_argument(
        "--repeats", type=int, default=default, help=f"runs of each call (default: {default})"
    )


def bundle_for(model: str, precisions: tuple[str, ...] = EXPORTED) -> Path:
    """Return a bundle of the model with random weights in build/benchmarks, exporting it once.

    A bundle of an older schema is exported again.
    """
    suffix = "" if "int8" in precisions else "-".join(["", *precisions])
    folder = Path("build/benchmarks") / f"{model}{suffix}"
    manifest = folder / MANIFEST
    if (
        not manifest.is_file()
        or json.loads(manifest.read_text())["schema_version"] != SCHEMA_VERSION
    ):
        command = [sys.executable, "-m", "export", model, "--pretrained", "random", "--precision"]
        command += [*precisions, "-o", str(folder), "--force"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def cpu_precisions(bundle: edgeclip.Bundle) -> list[str]:
    """Return the precisions of a bundle that CPUs compute in."""
    return [name for name in bundle.manifest.precisions if "cpu" in PRECISIONS[name].auto_devices]


def versions_of(*packages: str) -> dict[str, str]:
    """Return the versions of the installed packages among these."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def label_set(rt: edgeclip.Runtime, count: int) -> edgeclip.LabelSet:
    """Return a LabelSet of random unit embeddings for a Runtime."""
    return edgeclip.LabelSet.random(count, rt.bundle.null_text, rt.text_identity())


def published_loop(z: torch.Tensor, null_text: torch.Tensor) -> torch.Tensor:
    """Return unit rows (N, D) after gradient ascent on cos(u, null text) from z, (N, D).

    CLIPure-Cos as published: CLIPure (arXiv 2502.18176), section 4, by autograd.
    """
    u = F.normalize(z, dim=1)
    for _ in range(STEPS):
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cosine_similarity(u, null_text[None]).sum(), u)
        u = F.normalize(u.detach() + STEP_SIZE * F.normalize(gradient, dim=1), dim=1)
    return u


def encoder_flops(model: Any) -> int:
    """Return the operations of open_clip's image encoder for one image, two per multiply-add."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    # With gradients: without them attention takes a fused path that is not counted.
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, height, width))
    return int(counter.get_total_flops())
