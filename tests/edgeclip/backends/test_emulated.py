"""GPU tests without a GPU: the core's CUDA code on the host, with tests/support/gpu/fake_tensorrt.py.

The core is compiled as for Python, with tests/csrc/cuda_shim instead of CUDA. It runs test_cuda_pipeline.py.
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
from tests.support.commands import BUNDLE
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
    pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux's linker"),
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
        compiled = folder / f"{source.parent.name}-{source.name}.o"
        command = ["c++", *flags, "-x", "c++", "-c", str(source), "-o", str(compiled)]
        subprocess.run(command, check=True)
        return str(compiled)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    path = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["c++", "-shared", "-pthread", *objects, "-o", str(path)], check=True)
    return path


def emulated(core: Path, command: list[str], trt: str, **environment: str) -> str:
    """Run a command on the emulated machine; return its output and exit status."""
    variables = {
        "EDGECLIP_EMULATED_CORE": str(core),
        "EDGECLIP_FAKE_TENSORRT": trt,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | variables | environment,
        timeout=300,
    )
    return f"{process.stdout}{process.stderr}exit status {process.returncode}"


# TensorRT, selected tests (all if empty), and environment variables.
MACHINES = {
    "old": ("tensorrt-10.3.0", "", {}),
    "new": ("tensorrt-11.4.0.106", "answers or graph", {}),
    "without graphs": ("tensorrt-10.3.0", "answers", {"EDGECLIP_SHIM_NO_CAPTURE": "1"}),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_gpu_tests_pass_on_an_emulated_gpu(core: Path, machine: str) -> None:
    trt, selection, environment = MACHINES[machine]
    options = ["-m", "gpu", "-p", "tests.support.gpu.emulation", "-q", "-x", "-k", selection]
    output = emulated(
        core,
        ["-m", "pytest", "tests/edgeclip/backends/test_cuda_pipeline.py", *options],
        trt,
        **environment,
    )
    assert output.endswith("exit status 0"), output
    assert " passed" in output
    assert " skipped" not in output


RUN = (
    "import tests.support.gpu.emulation, sys; from edgeclip.cli.main import main; sys.exit(main())"
)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_missing_driver_is_one_line(core: Path, device: str) -> None:
    command = [
        "-c",
        RUN,
        "classify",
        "examples/bag.png",
        *BUNDLE,
        "--label",
        "bag",
        "--device",
        device,
    ]
    output = emulated(core, command, "tensorrt-10.3.0", EDGECLIP_SHIM_NO_GPU="1")
    *_, line, status = output.splitlines()
    assert status == "exit status 2"
    assert line.startswith("error: ")
    assert "no CUDA-capable device is detected" in line
    assert "Traceback" not in output


def test_auto_falls_back_to_the_cpu_with_a_warning(core: Path) -> None:
    command = [
        "-c",
        RUN,
        "classify",
        "examples/bag.png",
        *BUNDLE,
        "--label",
        "bag",
        "--format",
        "csv",
    ]
    output = emulated(core, command, "tensorrt-10.3.0", EDGECLIP_SHIM_NO_GPU="1")
    assert "no CUDA-capable device is detected; using cpu" in output
    assert output.endswith("exit status 0")


def test_a_failed_capture_is_logged_and_harmless(core: Path, tmp_path: Path) -> None:
    cache = {"EDGECLIP_CACHE": str(tmp_path), "EDGECLIP_SHIM_NO_CAPTURE": "1"}
    command = ["-c", RUN, "build", "garments", "--precision", "fp32"]
    output = emulated(core, command, "tensorrt-10.3.0", **cache)
    assert output.endswith("exit status 0"), output
    assert "no CUDA graph was captured" in output
    assert "cudaErrorStreamCaptureInvalidated" in output
