"""A tiny CLIP whose text tokens are as wide as its embeddings, a prior for it, and their bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from edgeclip.bundle import Bundle
from export.bundle import export_bundle
from tests.support.export_models import made_once, write_folder
from train.models.checkpoints import Source, load
from train.models.prior import DiffusionPrior, Shape
from train.models.trained_prior import TrainedPrior, load_prior
from train.models.wording import wording

DIM = 32  # the width of the tiny text tower
VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}


def write_prior(path: Path, *, depth: int = 2, heads: int = 2, seed: int = 0) -> Path:
    """Weights of a prior whose prediction depends on everything it is given, in a safetensors file."""
    torch.manual_seed(seed)
    state = DiffusionPrior(Shape(DIM, depth, heads)).state_dict()
    for key, value in state.items():
        if not key.startswith("noise_scheduler.") and "freqs" not in key:
            value += 0.3 * torch.randn_like(value)
    save_file({key: value.clone() for key, value in state.items()}, path)
    return path


@dataclass(frozen=True)
class Conditioned:
    """A model and a prior in PyTorch, and the bundle that was made of them."""

    folder: Path
    source: Source
    weights: Path  # of the prior
    prior: TrainedPrior
    bundle: Bundle


@made_once
def with_prior(root: Path) -> Conditioned:
    folder = write_folder(root / "conditioned", "vit", embed_dim=DIM, **VISION)
    source = load(str(folder), None)
    weights = write_prior(root / "prior.safetensors")
    prior = load_prior(weights)
    out = root / "conditioned-bundle"
    export_bundle(source, out, wording(source), prior=prior)
    return Conditioned(folder, source, weights, prior, Bundle(out))


def relative(found: torch.Tensor | np.ndarray, wanted: torch.Tensor | np.ndarray) -> float:
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
