"""Tiny CLIP whose text tokens are as wide as its embeddings, a prior for it, and their bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from edgeclip.bundle import Bundle
from export.bundle import export_bundle
from tests.support.models.export_models import cached, write_folder
from train.models.checkpoints import Source, load
from train.models.prior import DiffusionPrior, Shape
from train.models.trained_prior import TrainedPrior, load_prior
from train.models.wording import wording

DIM = 32  # width of the tiny text tower
VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}


def write_prior(path: Path, *, depth: int = 2, heads: int = 2, seed: int = 0) -> Path:
    """Write random weights of a prior that depends on all of its inputs, as safetensors."""
    torch.manual_seed(seed)
    state = DiffusionPrior(Shape(DIM, depth, heads)).state_dict()
    for key, value in state.items():
        if not key.startswith("noise_scheduler.") and "freqs" not in key:
            value += 0.3 * torch.randn_like(value)
    save_file({key: value.clone() for key, value in state.items()}, path)
    return path


@dataclass(frozen=True)
class Conditioned:
    """A model and a prior in PyTorch, and their bundle."""

    folder: Path
    source: Source
    weights: Path  # the prior's file
    prior: TrainedPrior
    bundle: Bundle


@cached
def with_prior(root: Path) -> Conditioned:
    folder = write_folder(root / "conditioned", "vit", embed_dim=DIM, **VISION)
    source = load(str(folder), None)
    weights = write_prior(root / "prior.safetensors")
    prior = load_prior(weights)
    out = root / "conditioned-bundle"
    export_bundle(source, out, wording(source), prior=prior)
    return Conditioned(folder, source, weights, prior, Bundle(out))


def relative(actual: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
