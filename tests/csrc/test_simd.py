"""Every instruction set's version of the operations: EDGECLIP_SIMD, in processes of their own.

Each of them against float64 NumPy and Pillow at awkward sizes, and against the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.support.paths import ROOT

LEVELS = ["baseline", "avx2", "avx512"]
SIZES = [1, 33, 2049]  # of embeddings, and numbers of classes
IMAGES = [(1, 1), (33, 2049), (2049, 33), (97, 101)]
TARGETS = [(1, 1), (33, 33), (24, 41)]
STEPS, STEP_SIZE = 3, 0.3


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process whose working directory is that of the tests."""
    inherited = {k: v for k, v in os.environ.items() if k != "EDGECLIP_SIMD"}
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | environment,
    )


def available() -> list[str]:
    best = run("from edgeclip import _core; print(_core.simd())").stdout.strip()
    return LEVELS[: LEVELS.index(best) + 1]


def problems() -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Embeddings (3 or 33, D), classes (K, D) with unit rows, a unit null text (D,)."""
    for d in SIZES:
        for k in SIZES:
            rng = np.random.default_rng(k + d)
            classes = rng.standard_normal((k, d)).astype(np.float32)
            classes /= np.linalg.norm(classes, axis=1, keepdims=True)
            null_text = rng.standard_normal(d).astype(np.float32)
            null_text /= np.linalg.norm(null_text)
            for n in (1, 33):
                yield f"{n} {d} {k}", rng.standard_normal((n, d), np.float32), classes, null_text


def pictures() -> Iterator[tuple[str, np.ndarray, tuple[int, int]]]:
    rng = np.random.default_rng(0)
    for size in IMAGES:
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        for target in TARGETS:
            yield f"{size} {target}", image, target


def compute(path: str) -> None:
    """What this process's instruction set makes of all of them, into a .npz file."""
    from edgeclip import _core

    found: dict[str, np.ndarray] = {}
    for name, image, target in pictures():
        out = np.full((3, *target), np.nan, np.float32)
        _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1), resize="squash")
        found[f"pixels {name}"] = out
    for name, embeddings, classes, null_text in problems():
        purification = {"steps": STEPS, "step_size": STEP_SIZE}
        found[f"purified {name}"] = _core.purify_cos(embeddings, null_text, **purification)
        found[f"moved {name}"] = _core.polar_step(
            embeddings, embeddings[::-1].copy(), step_size=0.5
        )
        answers = _core.classify(
            embeddings,
            classes,
            logit_scale=10.0,
            null_text=null_text,
            null_scores=classes @ null_text,
            top_k=7,
            return_logits=True,
            **purification,
        )
        for kind, array in zip(("indices", "probabilities", "logits"), answers, strict=True):
            found[f"{kind} {name}"] = array
    np.savez(path, simd=np.array(_core.simd()), **found)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for level in available():
        path = tmp_path_factory.mktemp("simd") / "found.npz"
        code = f"from tests.csrc import test_simd; test_simd.compute({str(path)!r})"
        done = run(code, EDGECLIP_SIMD=level)
        assert done.returncode == 0, done.stderr
        with np.load(path) as arrays:
            found[level] = dict(arrays)
        assert found[level].pop("simd") == level
    return found


def test_pixels_are_pillows_on_every_path(results: dict[str, dict[str, np.ndarray]]) -> None:
    for name, image, (height, width) in pictures():
        rows, columns = image.shape[:2]
        between = (width, rows)
        if max(0, 2 * (columns - width)) < rows - height:  # Pillow's order since version 13
            between = (columns, height)
        first = Image.fromarray(image).resize(between, Image.Resampling.BICUBIC)
        pillows = np.asarray(first.resize((width, height), Image.Resampling.BICUBIC))
        expected = pillows.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        for level, found in results.items():
            np.testing.assert_array_equal(found[f"pixels {name}"], expected, f"{level} {name}")


def purified(z: np.ndarray, t: np.ndarray) -> np.ndarray:
    """CLIPure-Cos by its definition, in float64, with the norms kept."""
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    u, t = z / norms, t / np.linalg.norm(t)
    for _ in range(STEPS):
        tangent = t - (u @ t)[:, None] * u
        length = np.linalg.norm(tangent, axis=1, keepdims=True)
        if u.shape[1] > 1:
            u = u + STEP_SIZE * tangent / length
        u /= np.linalg.norm(u, axis=1, keepdims=True)
    return norms * u


def test_every_path_equals_float64(results: dict[str, dict[str, np.ndarray]]) -> None:
    for name, embeddings, classes, null_text in problems():
        clean = purified(embeddings.astype(float), null_text.astype(float))
        lengths = np.linalg.norm(embeddings.astype(float), axis=1, keepdims=True)
        logits = 10 * (clean / lengths) @ classes.T.astype(float)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax = powers / powers.sum(axis=1, keepdims=True)
        for found in results.values():
            difference = np.linalg.norm(found[f"purified {name}"] - clean, axis=1)
            assert np.all(difference <= 1e-6 * lengths[:, 0])
            np.testing.assert_allclose(found[f"logits {name}"], logits, atol=2e-5)
            indices = found[f"indices {name}"]
            order = np.argsort(-found[f"logits {name}"], axis=1, kind="stable")
            np.testing.assert_array_equal(indices, order[:, : indices.shape[1]])
            expected = np.take_along_axis(softmax, indices, axis=1)
            np.testing.assert_allclose(found[f"probabilities {name}"], expected, rtol=3e-5)


def test_the_paths_agree(results: dict[str, dict[str, np.ndarray]]) -> None:
    baseline = results["baseline"]
    for found in results.values():
        assert found.keys() == baseline.keys()
        for name, array in found.items():
            if name.startswith(("purified", "moved", "probabilities")):
                np.testing.assert_allclose(array, baseline[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", ["sse", "AVX2", "avx512 ", "0"])
def test_an_unknown_instruction_set_is_an_error(value: str) -> None:
    code = "from edgeclip import _core; _core.simd()"
    done = run(code, EDGECLIP_SIMD=value)
    message = f"EDGECLIP_SIMD must be baseline, avx2 or avx512, got '{value}'"
    assert done.stderr.splitlines()[-1] == f"RuntimeError: {message}"
    code = "from edgeclip.cli.main import main; import sys; sys.exit(main(['doctor']))"
    done = run(code, EDGECLIP_SIMD=value)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_an_operation_does_not_fall_back() -> None:
    code = """
import numpy as np
from edgeclip import _core
image, out = np.zeros((2000, 2000, 3), np.uint8), np.zeros((3, 8, 8), np.float32)
for _ in range(2):
    try:
        _core.preprocess(image, out, mean=(0, 0, 0), std=(1, 1, 1))
    except RuntimeError as err:
        print(err)
"""
    done = run(code, EDGECLIP_SIMD="neon")
    assert done.stdout == 2 * "EDGECLIP_SIMD must be baseline, avx2 or avx512, got 'neon'\n"


@pytest.mark.parametrize("level", LEVELS)
def test_doctor_prints_it(level: str) -> None:
    code = "from edgeclip.cli.main import main; import sys; sys.exit(main(['doctor', '--device', 'cpu']))"
    done = run(code, EDGECLIP_SIMD=level)
    if level in available():
        assert done.returncode == 0, done.stderr
        assert f"core {level}," in done.stdout
    else:
        assert done.returncode == 2
        assert f"error: EDGECLIP_SIMD={level}: this machine supports at most" in done.stderr


def test_empty_is_unset() -> None:
    code = "from edgeclip import _core; print(_core.simd())"
    assert run(code, EDGECLIP_SIMD="").stdout == run(code).stdout
