"""Batch norm with fixed statistics, folded into the convolution before it while a model is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def _pairs(model: nn.Module, images: Tensor) -> list[tuple[str, nn.Conv2d]]:
    """Return the name of each batch norm that reads a convolution's output in model(images), and the latter."""
    found: list[tuple[str, nn.Conv2d]] = []
    last: dict[int, tuple[nn.Conv2d, Tensor]] = {}

    def note(name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            last[id(output)] = layer, output  # held, so that its id stays its own
        elif id(inputs[0]) in last:
            found.append((name, last[id(inputs[0])][0]))

    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):

            def hook(layer: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                note(name, layer, inputs, output)

            hooks.append(layer.register_forward_hook(hook))
    model(images)
    for handle in hooks:
        handle.remove()
    return found


@contextmanager
def folded(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Fold the batch norms of a model in evaluation mode, for the time of the context.

    Training a folded network is faster, and the function is the same. At the end, weights and biases
    that were trained go back, into batch norms with mean 0 and variance 1. images: an input, which
    shows what batch norm follows which convolution.
    """
    places: list[tuple[nn.Module, str, Any, Any, bool]] = []
    for name, conv in _pairs(model, images):
        parent, _, last = name.rpartition(".")
        norm: Any = model.get_submodule(name)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )  # fmt: skip
        owner, bare = model.get_submodule(parent), conv.bias is None
        places.append((owner, last, norm, conv, bare))
        # timm's batch norm has its activation inside.
        setattr(owner, last, getattr(norm, "act", nn.Identity()))
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, last, norm, conv, bare in places:
                norm.running_mean.zero_()
                norm.running_var.fill_(1)
                norm.weight.fill_(math.sqrt(1 + norm.eps))
                norm.bias.copy_(conv.bias)
                conv.bias = None if bare else nn.Parameter(torch.zeros_like(conv.bias))
                setattr(owner, last, norm)
