"""The CPU operations on machines that this is not, emulated by QEMU, against this one.

An old x86-64 and one with AVX2 run the binary that is built here, for all; the baseline of 64-bit ARM,
NEON, is what a Jetson's CPU runs. Without QEMU these are skipped: test_simd.py forces the same
x86-64 versions on this machine, against NumPy and Pillow.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support.compilers import CPU_SOURCES, LEVELS
from tests.support.paths import ROOT

SOURCES = [
    *CPU_SOURCES,
    ROOT / "csrc" / "cuda" / "no_cuda.cc",
    ROOT / "tests" / "csrc" / "answers.cc",
]
ARM = "aarch64-linux-gnu-g++"
Answers = list[tuple[str, np.ndarray]]

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def build(compiler: str, folder: Path, flags: list[str]) -> Path:
    """As CMakeLists.txt does, but static: an emulated machine has none of this one's libraries."""
    program = folder / "answers"
    filters = folder / "resample.o"
    common = ["-std=c++17", "-O2", "-pthread", f"-I{ROOT}", *flags]
    resample = ROOT / "csrc" / "cpu" / "resample.cc"
    subprocess.run(
        [compiler, *common, "-ffp-contract=off", "-c", str(resample), "-o", str(filters)],
        check=True,
    )
    others = [str(source) for source in SOURCES if source != resample]
    command = [compiler, *common, "-static", *others, str(filters), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def answers(command: list[str | Path], **environment: str) -> tuple[str, Answers]:
    """The instruction set that ran, and the name and values of each line."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("EDGECLIP_SIMD", "LD_PRELOAD")}
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=inherited | environment,
    )
    assert done.returncode == 0, done.stderr
    first, *lines = (line.split(" ") for line in done.stdout.splitlines())
    return first[1], [(line[0], np.array(line[1:], np.float64)) for line in lines]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("c++", tmp_path_factory.mktemp("native"), LEVELS)


@pytest.fixture(scope="module")
def expected(native: Path) -> Answers:
    """Of this machine's best instruction set."""
    _, found = answers([native])
    assert len(found) == 8 * 3 + 6 * 4
    assert all(np.isfinite(values).all() for _, values in found)
    return found


def check(found: Answers, expected: Answers) -> None:
    for (name, values), (expected_name, expected_values) in zip(found, expected, strict=True):
        assert name == expected_name
        if name == "preprocess":
            np.testing.assert_array_equal(values, expected_values)
        else:
            np.testing.assert_allclose(values, expected_values, rtol=1e-5, atol=1e-6)


def emulator(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} (Debian: qemu-user)")
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs this machine's binary")
@pytest.mark.parametrize(("cpu", "level"), [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_x86_64(native: Path, expected: Answers, cpu: str, level: str) -> None:
    simd, found = answers([emulator("qemu-x86_64"), "-cpu", cpu, native])
    assert simd == level
    check(found, expected)


def test_64_bit_arm(expected: Answers, tmp_path: Path) -> None:
    if shutil.which(ARM) is None:
        pytest.skip(f"needs {ARM} (Debian: g++-aarch64-linux-gnu)")
    simd, found = answers([emulator("qemu-aarch64"), build(ARM, tmp_path, [])])
    assert simd == "baseline"
    check(found, expected)
