"""The CUDA kernels' own sources, compiled for the host by tests/csrc/cuda_shim, against the CPU path.

They run under the sanitizers, so that a missing barrier is a failure and not a matter of luck; with
one planted, the run has to fail.
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
# The shim's headers take the place of CUDA's; g++ knows neither .cu nor #pragma unroll.
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
    # A preloaded library would come before the sanitizer's own, which it refuses.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["TSAN_OPTIONS"] = "halt_on_error=1"  # after a race the barriers may never open
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
    """For the thread sanitizer."""
    return build(["-fsanitize=thread"], tmp_path_factory.mktemp("thread"))


def test_kernels_equal_the_cpu_path(tmp_path: Path) -> None:
    done = run(build(["-fsanitize=address,undefined"], tmp_path), "all")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


@pytest.mark.parametrize("what", ["threads", "one-launch", "two-launches"])
def test_kernels_have_no_data_race(program: Path, what: str) -> None:
    done = run(program, what)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"


@pytest.mark.parametrize("barrier", ["0", "1"])
@pytest.mark.parametrize("what", ["one-launch", "two-launches"])
def test_a_missing_barrier_is_found(program: Path, what: str, barrier: str) -> None:
    # The sanitizer remembers the last accesses to a word only, and may miss a race among hundreds of
    # threads; several runs of it do not.
    for _ in range(5):
        done = run(program, what, barrier)
        if done.returncode != 0:
            break
    assert done.returncode == DATA_RACE, done.stderr
    assert "data race" in done.stderr
