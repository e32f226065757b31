"""Compilation of the CUDA kernels for GPU architectures, with a limit on their registers.

Needs no GPU, but nvcc: on the PATH, or from the Python packages of CUDA, which the extra `dev`
installs. Exits with 1 if a kernel spills registers or uses too many.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [75, 80, 86, 87, 89, 90, 110, 120]  # as in CMakeLists.txt
MAX_REGISTERS = 128  # two blocks of 256 threads fit any multiprocessor
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Kernel(NamedTuple):
    architecture: int
    name: str
    registers: int
    spilled: int  # bytes
    stack: int  # bytes
    shared: int  # bytes, without those requested at launch

    @property
    def fits(self) -> bool:
        return self.registers <= MAX_REGISTERS and self.spilled == 0


def find_nvcc() -> str | None:
    """Return nvcc on the PATH, or in this Python's packages (`nvidia/cu13/bin` for CUDA 13), or None."""
    if (nvcc := shutil.which("nvcc")) is not None:
        return nvcc
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):  # newest first
            return str(path)
    return None


def demangle(name: str) -> str:
    """Return a kernel's name and template arguments, without namespaces."""
    if shutil.which("c++filt") is None:
        return name
    process = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True)
    text = process.stdout.strip().replace("(anonymous namespace)", "")
    return re.sub(r"(\w*::)+|^void | (?=>)", "", text[: text.rindex("(")])


def compile_kernels(nvcc: str, source: Path, architecture: int, folder: Path) -> list[Kernel]:
    """Compile one file; raise RuntimeError with nvcc's output if it fails or warns."""
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "--resource-usage"]
    command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", f"-I{ROOT}", "-c", str(source)]
    command += ["-fmad=false"] if source.name == "preprocess.cu" else []  # as CMakeLists.txt
    command += ["-o", str(folder / f"{source.stem}.o")]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stdout}{process.stderr}")
    kernels = []
    for match in ENTRY.finditer(process.stdout + process.stderr):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        kernels.append(
            Kernel(
                architecture,
                demangle(match["name"]),
                int(match["registers"]),
                int(match["stores"]) + int(match["loads"]),
                int(match["stack"]),
                int(shared[1]) if shared else 0,
            )
        )
    return kernels


def report(nvcc: str, architectures: list[int]) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            kernel
            for architecture in architectures
            for source in SOURCES
            for kernel in compile_kernels(nvcc, source, architecture, Path(folder))
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", type=int, nargs="*", help="such as 87 (default: all)")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("cuda_check: needs nvcc on the PATH, or pip install 'cuda-toolkit[cccl,nvcc]'")
    kernels = report(nvcc, args.architectures or ARCHITECTURES)
    print("| GPU | kernel | registers | spilled, bytes | stack, bytes | static shared, bytes |")
    print("|---|---|---|---|---|---|")
    for k in kernels:
        numbers = f"{k.registers} | {k.spilled} | {k.stack} | {k.shared}"
        print(f"| sm_{k.architecture} | `{k.name}` | {numbers} |")
    bad = [k for k in kernels if not k.fits]
    for k in bad:
        print(f"sm_{k.architecture} {k.name}: over {MAX_REGISTERS} registers, or spills")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
