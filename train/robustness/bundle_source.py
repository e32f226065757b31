"""Model of a bundle's own files: the image encoder's graph in PyTorch, the text encoder in ONNX Runtime."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeclip.backends.base import EMBEDDING
from edgeclip.backends.golden_values import GoldenValues
from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.bundle import Bundle
from edgeclip.text.tower import TextTower
from train.errors import ModelError
from train.models.checkpoints import Source
from train.robustness.graph import Graph

GRAPH_ERROR = 1e-4  # distance of unit embeddings between the graph in PyTorch and in ONNX Runtime


class BundleModel(nn.Module):
    """CLIP with open_clip's methods. Only encode_image has a gradient."""

    def __init__(self, bundle: Bundle, precision: str) -> None:
        super().__init__()
        manifest = bundle.manifest
        self.graph = Graph(bundle.encoder("image_encoder", precision), EMBEDDING)
        self.text = OnnxEncoder(bundle.encoder("text_encoder", precision), device="cpu")
        image = manifest.image
        self.visual = SimpleNamespace(
            preprocess_cfg={
                "size": image.size,
                "mode": "RGB",
                "mean": image.mean,
                "std": image.std,
                "interpolation": image.interpolation,
                "resize_mode": image.resize,
                "fill_color": image.fill,
            },
            image_size=image.size,
        )
        self.register_buffer("logit_scale", torch.tensor(math.log(manifest.logit_scale)))

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Return embeddings (B, D) of preprocessed pixels (B, 3, H, W)."""
        embedding: Tensor = self.graph(pixels)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Return embeddings (N, D) of token ids (N, L)."""
        rows = torch.from_numpy(self.text.embed(ids.numpy()))
        return F.normalize(rows, dim=-1) if normalize else rows


def bundle_source(bundle: Bundle, precision: str) -> Source:
    """Load a bundle's model in one precision, checked against ONNX Runtime on its golden image.

    Raises ModelError where the graph has no gradient, or computes something else in PyTorch.
    """
    model: Any = BundleModel(bundle, precision).eval()
    encoder = OnnxEncoder(bundle.encoder("image_encoder", precision), device="cpu")
    pixels, _ = GoldenValues(bundle).encoder("image")
    noise = np.random.default_rng(0).normal(size=pixels.shape).astype(np.float32)
    for x in (pixels, noise):
        expected = F.normalize(torch.from_numpy(encoder.embed(x)), dim=1)
        with torch.no_grad():
            distance = (model.encode_image(torch.from_numpy(x), True) - expected).norm(dim=1).max()
        if not distance <= GRAPH_ERROR:
            raise ModelError(
                f"{bundle.path}: {precision} differs by {distance:.2g} between PyTorch and ONNX Runtime"
            )
    files, row = bundle.manifest.files, bundle.manifest.precisions[precision]
    hashes = [files[name] for name in (row.image_encoder, row.text_encoder) if name in files]
    tower = TextTower(bundle, precision, device="cpu")
    return Source(
        model,
        lambda texts: torch.from_numpy(tower.tokenize(texts)),
        bundle.manifest.source.get("model", ""),
        f"the bundle's {precision}",
        hashlib.sha256(" ".join(hashes).encode()).hexdigest(),
        {"model_cfg": {"quick_gelu": False}},  # the graph has its own activations
    )
