"""Results of int8 on x86-64 processors without VNNI or AVX2, emulated by QEMU.

On these ONNX Runtime adds pairs of int8 products in 16 bits, which saturate if weights have eight bits.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgeclip
from edgeclip.backends.golden_values import largest_distance
from edgeclip.bundle import Bundle
from tests.support.paths import GARMENTS

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None,
    reason="needs qemu-x86_64 on x86-64",
)

IMAGES = 6
PROMPTS = ["a photo of a bag.", "a picture of an ankle boot.", "a coat"]
# Encoders without a Runtime, whose trial would reject a wrong precision.
EMBED = """
import sys
import numpy as np
import edgeclip
from edgeclip.backends.onnx_runtime import OnnxEncoder
bundle = edgeclip.Bundle(sys.argv[1])
inputs = np.load(sys.argv[2])
np.savez(sys.argv[3], **{
    f"{kind} {precision}": OnnxEncoder(
        bundle.encoder(f"{kind}_encoder", precision), device="cpu", threads=1
    ).embed(inputs[kind])
    for kind in sys.argv[4].split()
    for precision in ("fp32", "int8")
})
"""


def embeddings(
    bundle: Path, folder: Path, cpu: str = "", kinds: str = "image text"
) -> dict[str, np.ndarray]:
    """Return "KIND PRECISION" -> unit embeddings, on this processor or an emulated one."""
    emulator = ["qemu-x86_64", "-cpu", cpu] if cpu else []
    out = folder / "out.npz"
    process = subprocess.run(
        [*emulator, sys.executable, "-c", EMBED, bundle, folder / "inputs.npz", out, kinds],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        # Restrict NumPy and the core to instructions that the emulated processor has.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "EDGECLIP_SIMD": "baseline"},
    )
    assert process.returncode == 0, process.stderr
    with np.load(out) as arrays:
        return {n: a / np.linalg.norm(a, axis=1, keepdims=True) for n, a in arrays.items()}


@pytest.fixture
def folder(tmp_path: Path, fashion: tuple[np.ndarray, np.ndarray]) -> Path:
    runtime = edgeclip.Runtime("garments", precision="fp32", purify="none")
    pixels = runtime.preprocess(list(fashion[0][:IMAGES]))
    np.savez(tmp_path / "inputs.npz", image=pixels, text=runtime.tokenize(PROMPTS))
    return tmp_path


@pytest.mark.parametrize("cpu", ["Haswell", pytest.param("Nehalem", marks=pytest.mark.slow)])
def test_int8_is_the_same_without_vnni(folder: Path, cpu: str) -> None:
    here, there = embeddings(GARMENTS, folder), embeddings(GARMENTS, folder, cpu)
    for name, rows in there.items():
        assert largest_distance(rows, here[name]) < (1e-5 if "fp32" in name else 5e-3), name
    for kind, limit in (("image", 0.02), ("text", 0.07)):
        assert largest_distance(there[f"{kind} int8"], there[f"{kind} fp32"]) < limit


def test_eight_bit_weights_saturate(folder: Path) -> None:
    """Check that the test above would fail for weights of eight bits."""
    copy = folder / "bundle"
    shutil.copytree(GARMENTS, copy)
    path = copy / "image_encoder.int8.onnx"
    model = onnx.load(path)
    arrays = {t.name: t for t in model.graph.initializer}
    for name, tensor in arrays.items():
        if name.endswith("_quantized"):
            doubled = numpy_helper.to_array(tensor).astype(np.int16) * 2
            scale = arrays[name.replace("_quantized", "_scale")]
            half = numpy_helper.to_array(scale) / 2
            tensor.CopyFrom(numpy_helper.from_array(doubled.clip(-127, 127).astype(np.int8), name))
            scale.CopyFrom(numpy_helper.from_array(half, scale.name))
    onnx.save(model, path)
    Bundle.write_manifest(copy, Bundle(copy).manifest)
    there = embeddings(copy, folder, "Haswell", "image")
    assert largest_distance(there["image int8"], there["image fp32"]) > 0.05
