"""Compilers, and source files of the core."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from tests.support.paths import ROOT

CPU_SOURCES = [
    ROOT / "csrc" / "geometry.cc",
    ROOT / "csrc" / "ops.cc",
    *sorted((ROOT / "csrc" / "cpu").glob("*.cc")),
]
# CMakeLists.txt tests the compiler instead.
LEVELS = ["-DEDGECLIP_HAVE_X86_LEVELS"] if platform.machine() == "x86_64" else []
PROBE = "int main() { return 0; }"


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
