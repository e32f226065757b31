"""The C++ operations under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_SOURCES = [
    ROOT / "csrc" / "geometry.cc",
    ROOT / "csrc" / "ops.cc",
    *sorted((ROOT / "csrc" / "cpu").glob("*.cc")),
]
SOURCES = [
    *CPU_SOURCES,
    ROOT / "csrc" / "cuda" / "no_cuda.cc",
    ROOT / "tests" / "csrc" / "ops_test.cc",
]
PROBE = "int main() { return 0; }"
# As CMakeLists.txt finds out with the compiler of the machine.
LEVELS = ["-DEDGECLIP_HAVE_X86_LEVELS"] if platform.machine() == "x86_64" else []


def compile_with(flags: list[str], sources: list[Path], program: Path) -> None:
    command = ["c++", "-std=c++17", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror"]
    command += [*flags, "-fno-sanitize-recover=all", f"-I{ROOT}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)


def works(flags: list[str], folder: Path) -> bool:
    source = folder / "probe.cc"
    source.write_text(PROBE)
    try:
        compile_with(flags, [source], folder / "probe")
        return subprocess.run([folder / "probe"], check=False).returncode == 0
    except subprocess.CalledProcessError:
        return False


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["-fsanitize=address,undefined", *LEVELS], "all"),
        (["-fsanitize=thread", *LEVELS], "threads"),
    ],
    ids=["address", "thread"],
)
def test_operations_run_clean(flags: list[str], what: str, tmp_path: Path) -> None:
    if not works(flags, tmp_path):
        pytest.skip(f"{' '.join(flags)} does not work here")
    program = tmp_path / "ops_test"
    compile_with(flags, SOURCES, program)
    # A preloaded library would come before the sanitizer's own, which it refuses.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        [program, what], check=False, capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ok\n"
