"""Inputs of fused graphs, and the runtime's answers to compare them with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

import edgeclip
from edgeclip.bundle import Bundle
from edgeclip.manifest import Variant
from edgeclip.purify import CosPurifier
from export.graphs import fp16
from tests.support.models.export_models import cached
from tests.support.paths import GARMENTS

Array = NDArray[Any]


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def unit_rows(count: int, dim: int, seed: int = 1) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_labels(runtime: edgeclip.Runtime, count: int) -> edgeclip.LabelSet:
    return edgeclip.LabelSet.random(
        count, runtime.bundle.null_text, runtime.text_identity(), seed=1
    )


def images_of(bundle: Bundle, count: int) -> NDArray[np.uint8]:
    """Return images of noise in different ranges."""
    random = np.random.default_rng(count)
    size = bundle.manifest.image.size
    tops = random.integers(2, 256, (count, 1, 1, 1))
    return random.integers(0, tops, (count, *size, 3)).astype(np.uint8)


def answers(
    runtime: edgeclip.Runtime, images: Array, labels: edgeclip.LabelSet, k: int
) -> tuple[Array, Array]:
    """Return the runtime's probabilities and indices, (N, k)."""
    actual = runtime.classify(list(images), labels, top_k=k)
    scores = [[p.score for p in row] for row in actual]
    return np.array(scores), np.array([[p.index for p in row] for row in actual])


def runtime_of(bundle: Bundle, purifier: CosPurifier | None, precision: str = "fp32") -> Any:
    return edgeclip.Runtime(bundle, device="cpu", precision=precision, purify=purifier, threads=1)


@cached
def halved(folder: Path) -> Bundle:
    """Return the bundle garments (fp32 and int8) with an image encoder in fp16."""
    shutil.copytree(GARMENTS, folder, dirs_exist_ok=True)
    manifest = Bundle(folder).manifest
    fp16.to_fp16(folder / "image_encoder.fp32.onnx", folder / "image_encoder.fp16.onnx")
    half = Variant("image_encoder.fp16.onnx", "text_encoder.fp32.onnx", "image_tokens.fp32.onnx")
    precisions = {**manifest.precisions, "fp16": half}
    Bundle.write_manifest(folder, dataclasses.replace(manifest, precisions=precisions))
    return Bundle(folder)
