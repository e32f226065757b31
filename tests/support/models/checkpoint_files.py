"""Weights of a model, saved in the formats that checkpoints come in."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

OPENAI_BUFFERS = {"input_resolution": 32, "context_length": 24, "vocab_size": 814}


class Archive(nn.Module):
    """Imitation of OpenAI's archives: float16 parameters by name, and three buffers."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for key, value in weights.items():
            *path, name = key.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.register_parameter(name, nn.Parameter(value.half(), requires_grad=False))
        for name, number in OPENAI_BUFFERS.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def save_torchscript(weights: dict[str, torch.Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files are still there
        torch.jit.save(torch.jit.trace(Archive(weights), torch.zeros(1)), str(path))


def save_as(kind: str, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    path = folder / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "state dict":
        torch.save(weights, path)
    elif kind == "open_clip checkpoint":
        state = {f"module.{key}": value for key, value in weights.items()}
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, path)
    elif kind == "training run":
        torch.save({"model": weights, "epoch": 3}, path)
    elif kind == "OpenAI archive":
        save_torchscript(weights, path)
    elif kind == "OpenAI state dict":
        half = {key: value.half() for key, value in weights.items()}
        torch.save(half | {k: torch.tensor(v) for k, v in OPENAI_BUFFERS.items()}, path)
    return path
