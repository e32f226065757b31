"""Latency of a bundle's image encoders on the exporting machine's CPU."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np

from edgeclip.backends.onnx_runtime import OnnxEncoder
from edgeclip.manifest import Manifest

ROUNDS = 7
RUNS = 3  # per round and precision


def cpu_ms(directory: Path, manifest: Manifest) -> dict[str, float]:
    """Return the median time of one image in each precision, in milliseconds.

    The precisions take turns, so that a change of the machine's load affects them alike.
    """
    pixels = np.zeros((1, 3, *manifest.image.size), np.float32)
    encoders = {
        name: OnnxEncoder(directory / variant.image_encoder, device="cpu")
        for name, variant in manifest.precisions.items()
    }
    times: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(ROUNDS):
        for name, encoder in encoders.items():
            encoder.embed(pixels)  # warm-up: the previous encoder's threads still spin
            for _ in range(RUNS):
                start = time.perf_counter()
                encoder.embed(pixels)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}
