"""CUDA kernels compiled for the host with tests/csrc/cuda_shim, compared with the CPU path.

They run under the sanitizers, which detect a missing barrier. A test removes a barrier and expects a
failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.compilers import CPU_SOURCES, compile_with, works
from tests.support.paths import ROOT

SHIM = ROOT / "tests" / "csrc" / "cuda_shim"
SOURCES = [
    *CPU_SOURCES,
    *sorted(SHIM.glob("*.cc")),
    ROOT / "tests" / "csrc" / "cuda_test.cc",
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
]
# The shim's headers replace CUDA's; g++ does not know .cu and #pragma unroll.
FLAGS = ["-isystem", str(SHIM), "-Wno-unknown-pragmas", "-x", "c++"]
DATA_RACE = 66  # the thread sanitizer's exit status

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def build(flags: list[str], folder: Path) -> Path:
    if not works(flags, folder):
        pytest.skip(f"{' '.join(flags)} does not work here")
    program = folder / "cuda_test"
    compile_with([*flags, *FLAGS], SOURCES, program)
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A sanitizer refuses to start after a preloaded library.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["TSAN_OPTIONS"] = "halt_on_error=1"  # after a race the program may hang
    return subprocess.run(
        [program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the program with the thread sanitizer."""
    return build(["-fsanitize=thread"], tmp_path_factory.mktemp("thread"))


def test_kernels_equal_the_cpu_path(tmp_path: Path) -> None:
    process = run(build(["-fsanitize=address,undefined"], tmp_path), "all")
    assert process.returncode == 0, process.stderr
    assert process.stdout == "ok\n"


@pytest.mark.parametrize("case", ["threads", "one-launch", "two-launches"])
def test_kernels_have_no_data_race(program: Path, case: str) -> None:
    process = run(program, case)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "ok\n"


@pytest.mark.parametrize("barrier", ["0", "1"])
@pytest.mark.parametrize("case", ["one-launch", "two-launches"])
def test_a_missing_barrier_is_detected(program: Path, case: str, barrier: str) -> None:
    # The sanitizer remembers only the last accesses to a word, so that one run may miss a race.
    for _ in range(5):
        process = run(program, case, barrier)
        if process.returncode != 0:
            break
    assert process.returncode == DATA_RACE, process.stderr
    assert "data race" in process.stderr
