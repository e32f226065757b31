"""A trained diffusion prior: its checkpoint, and the text context that conditions it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeclip.storage import sha256
from train.errors import ModelError
from train.models.checkpoints import Source
from train.models.prior import Context, DiffusionPrior
from train.models.weight_files import read_file

WEIGHTS = "prior.safetensors"  # in the folder of a run


@dataclass(frozen=True)
class TrainedPrior:
    """A diffusion prior in PyTorch, and the hash of its file."""

    model: DiffusionPrior
    weights_sha256: str


def load_prior(path: Path) -> TrainedPrior:
    """Load a run of train.diffusion_prior, a safetensors file or a dalle2-pytorch checkpoint.

    Runs no code in the file. Raises ModelError.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{file} does not exist: name a run of train.diffusion_prior, or a file")
    state = read_file(file)
    if not isinstance(state, Mapping):
        raise ModelError(f"{file} holds no state dict")
    try:
        model = DiffusionPrior.from_state_dict(state)
    except ModelError as err:
        raise ModelError(f"{file}: {err}") from err
    return TrainedPrior(model, sha256(file))


@torch.no_grad()
def text_tokens(source: Source, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return unit text embeddings (P, D) and the text tower's tokens (P, L, width).

    Tokens are the output of the last norm. Those after the end of a prompt are zero, if the tower
    pools at that end. Raises ModelError for a tower without such tokens.
    """
    tower = getattr(source.model, "text", source.model)
    if not hasattr(tower, "ln_final") or getattr(tower, "cls_emb", None) is not None:
        raise ModelError(f"the text tower of {source.name} gives a prior no tokens")
    outputs: list[Tensor] = []
    handle = tower.ln_final.register_forward_hook(lambda *args: outputs.append(args[2]))
    ids = source.tokenizer(list(prompts))
    try:
        embeddings = source.model.encode_text(ids, normalize=True)
    finally:
        handle.remove()
    return embeddings, outputs[0] * _prompt_mask(source.model, tower, ids)[:, :, None]


def _prompt_mask(model: Any, tower: Any, ids: Tensor) -> Tensor:
    """Return booleans (P, L): False after the end of a prompt where the tower pools at its end."""
    if getattr(tower, "pool_type", getattr(model, "text_pool_type", "")) in ("argmax", "eos"):
        return (
            torch.arange(ids.shape[1]) <= ids.argmax(1)[:, None]
        )  # the end mark has the highest id
    return torch.ones_like(ids, dtype=torch.bool)


def null_context(prior: DiffusionPrior, source: Source, templates: Sequence[str]) -> Context:
    """Return the prior's context for the null text and the tokens of its first template.

    Raises ModelError where the prior's width differs from the CLIP's.
    """
    embeddings, tokens = text_tokens(source, [text.replace("{}", "") for text in templates])
    if prior.shape.dim != embeddings.shape[1] or prior.shape.dim != tokens.shape[2]:
        raise ModelError(
            f"the prior is made for embeddings and text tokens of {prior.shape.dim} values, those of "
            f"{source.name} have {embeddings.shape[1]} and {tokens.shape[2]}: name a prior trained "
            "for this model"
        )
    with torch.no_grad():
        return prior.context(F.normalize(embeddings.mean(0, keepdim=True), dim=1), tokens[:1])
