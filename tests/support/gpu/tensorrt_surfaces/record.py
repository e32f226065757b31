"""Record the names of a TensorRT's Python API, for tests where no TensorRT is.

    pip download --no-deps --python-version 3.11 --only-binary :all: tensorrt-cu12-bindings==10.3.0
    python3.11 tests/support/gpu/tensorrt_surfaces/record.py tensorrt_cu12_bindings-10.3.0-cp311-*.whl
    python tests/support/gpu/tensorrt_surfaces/record.py tensorrt_rtx

A wheel of bindings is imported without the gigabytes of libraries that it is for: shared objects of
their names, whose functions do nothing, are enough to look at it. Needs a C compiler, and the Python
that the wheel is for. A name of a module is imported as it is installed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
CLASSES = (  # what edgeclip uses, or could
    "Builder",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IOutputAllocator",
    "IProfiler",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "ITensor",
    "ITimingCache",
    "Logger",
    "OnnxParser",
    "ParserError",
    "Runtime",
)
ENUMS = (
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DataType",
    "ErrorCode",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParserFlag",
    "PreviewFeature",
    "ProfilingVerbosity",
    "RuntimePlatform",
    "TensorIOMode",
    "TensorLocation",
)


def surface(trt: Any, name: str, source: str) -> dict[str, Any]:
    """Return the names of the module, of its classes' members, and of its enums with values."""
    enums = {x: getattr(trt, x) for x in ENUMS if hasattr(trt, x)}
    enums["ILogger.Severity"] = trt.ILogger.Severity
    classes = {x: getattr(trt, x) for x in CLASSES if hasattr(trt, x)}
    return {
        "module": name,
        "version": trt.__version__,
        "source": source,
        "names": _public(trt),
        "enums": {
            key: {member: int(value) for member, value in enum.__members__.items()}
            for key, enum in enums.items()
        },
        "classes": {key: _public(found) for key, found in classes.items()},
    }


def _public(found: Any) -> list[str]:
    return [name for name in dir(found) if not name.startswith("_")]


def from_wheel(wheel: Path) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (package,) = (x for x in folder.iterdir() if x.name.endswith("_bindings"))
    (binary,) = package.glob("*.so")
    major = re.search(rb"libnvinfer\.so\.([0-9]+)", binary.read_bytes())
    if major is None:
        raise SystemExit(f"{wheel} needs no libnvinfer: is it of bindings?")
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major[1].decode()}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, source.name]
        subprocess.run(command, cwd=folder, check=True)
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    module = importlib.import_module(package.name)
    return surface(module, package.name.removesuffix("_bindings"), wheel.name)


def main() -> None:
    (what,) = sys.argv[1:]
    if what.endswith(".whl"):
        found = from_wheel(Path(what))
    else:
        found = surface(importlib.import_module(what), what, f"{what} as installed")
    out = HERE / f"{found['module']}-{found['version']}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{out}: {len(found['names'])} names")


if __name__ == "__main__":
    main()
