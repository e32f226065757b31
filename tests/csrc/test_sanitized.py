"""C++ operations under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.compilers import CPU_SOURCES, LEVELS, compile_with, works
from tests.support.paths import ROOT

SOURCES = [
    *CPU_SOURCES,
    ROOT / "csrc" / "cuda" / "no_cuda.cc",
    ROOT / "tests" / "csrc" / "ops_test.cc",
]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("flags", "case"),
    [
        (["-fsanitize=address,undefined", *LEVELS], "all"),
        (["-fsanitize=thread", *LEVELS], "threads"),
    ],
    ids=["address", "thread"],
)
def test_operations_run_clean(flags: list[str], case: str, tmp_path: Path) -> None:
    if not works(flags, tmp_path):
        pytest.skip(f"{' '.join(flags)} does not work here")
    program = tmp_path / "ops_test"
    compile_with(flags, SOURCES, program)
    # A sanitizer refuses to start after a preloaded library.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    process = subprocess.run(
        [program, case], check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "ok\n"
