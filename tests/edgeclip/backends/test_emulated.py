"""tests/edgeclip/backends/test_cuda_pipeline.py where there is no GPU: the core's CUDA side on the host, and TensorRT's names alone.

The core is compiled as for Python, with tests/csrc/cuda_shim in the place of CUDA.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

import edgeclip
from tests.support.compilers import CPU_SOURCES
from tests.support.paths import ROOT

SHIM = ROOT / "tests" / "csrc" / "cuda_shim"
SOURCES = [
    *CPU_SOURCES,
    *sorted((ROOT / "csrc").glob("bindings*.cc")),
    ROOT / "csrc" / "arrays.cc",
    SHIM / "api.cc",
    SHIM.with_name("cuda_fibers") / "shim.cc",
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
]

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(platform.system() != "Linux", reason="of Linux's linker"),
]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", f"-I{ROOT}"]
    flags += ["-isystem", str(SHIM), "-isystem", sysconfig.get_path("include")]
    flags += ["-isystem", str(ROOT / "csrc" / "third_party")]
    flags += ["-isystem", pybind11.get_include(), "-Wno-unknown-pragmas"]
    flags += [f'-DEDGECLIP_VERSION="{edgeclip.__version__}"']

    def compile_one(source: Path) -> str:
        made = folder / f"{source.parent.name}-{source.name}.o"
        command = ["c++", *flags, "-x", "c++", "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    path = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["c++", "-shared", "-pthread", *objects, "-o", str(path)], check=True)
    return path


def emulated(core: Path, command: list[str], trt: str, **environment: str) -> str:
    """What the command prints on the emulated machine, with its exit status."""
    added = {
        "EDGECLIP_EMULATED_CORE": str(core),
        "EDGECLIP_FAKE_TENSORRT": trt,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | added | environment,
        timeout=300,
    )
    return f"{done.stdout}{done.stderr}exit status {done.returncode}"


# With an old TensorRT; in part with a new one, and where no graph is ever captured.
MACHINES = {
    "old": ("tensorrt-10.3.0", "", {}),
    "new": ("tensorrt-11.4.0.106", "answers or graph", {}),
    "without graphs": ("tensorrt-10.3.0", "answers", {"EDGECLIP_SHIM_NO_CAPTURE": "1"}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_tests_for_a_gpu_pass_on_an_emulated_one(core: Path, machine: str) -> None:
    trt, which, environment = MACHINES[machine]
    options = ["-m", "gpu", "-p", "tests.support.emulation", "-q", "-x", "-k", which]
    found = emulated(
        core,
        ["-m", "pytest", "tests/edgeclip/backends/test_cuda_pipeline.py", *options],
        trt,
        **environment,
    )
    assert found.endswith("exit status 0"), found
    assert " passed" in found
    assert " skipped" not in found


RUN = "import tests.support.emulation, sys; from edgeclip.cli.main import main; sys.exit(main())"


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_without_a_driver_it_is_said_in_a_line(core: Path, device: str) -> None:
    command = ["-c", RUN, "classify", "examples/bag.png", "--label", "bag", "--device", device]
    found = emulated(core, command, "tensorrt-10.3.0", EDGECLIP_SHIM_NO_GPU="1")
    *_, line, status = found.splitlines()
    assert status == "exit status 2"
    assert line.startswith("error: ")
    assert "no CUDA-capable device is detected" in line
    assert "Traceback" not in found


def test_auto_goes_on_to_the_cpu_and_says_so(core: Path) -> None:
    command = ["-c", RUN, "classify", "examples/bag.png", "--label", "bag", "--format", "csv"]
    found = emulated(core, command, "tensorrt-10.3.0", EDGECLIP_SHIM_NO_GPU="1")
    assert "no CUDA-capable device is detected; using cpu" in found
    assert found.endswith("exit status 0")


def test_a_capture_that_fails_costs_no_answer_and_is_said(core: Path, tmp_path: Path) -> None:
    cache = {"EDGECLIP_CACHE": str(tmp_path), "EDGECLIP_SHIM_NO_CAPTURE": "1"}
    found = emulated(core, ["-c", RUN, "build", "--precision", "fp32"], "tensorrt-10.3.0", **cache)
    assert found.endswith("exit status 0"), found
    assert "no CUDA graph was captured" in found
    assert "cudaErrorStreamCaptureInvalidated" in found
