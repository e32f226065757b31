"""Emulation of a GPU, as a pytest plugin; tests/edgeclip/backends/test_emulated.py uses it.

    pytest -p tests.support.gpu.emulation -m gpu tests/edgeclip/backends/test_cuda_pipeline.py

EDGECLIP_EMULATED_CORE is a core whose CUDA kernels, streams and graphs run on the host, by
tests/csrc/cuda_shim. EDGECLIP_FAKE_TENSORRT is the surface of fake_tensorrt. ONNX Runtime's CPU provider
replaces its CUDA provider, on memory that stands for the GPU's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

CORE = os.environ["EDGECLIP_EMULATED_CORE"]
spec = importlib.util.spec_from_file_location("edgeclip._core", CORE)
assert spec is not None
assert spec.loader is not None
core = importlib.util.module_from_spec(spec)
sys.modules["edgeclip._core"] = core  # before anything imports edgeclip
spec.loader.exec_module(core)

from edgeclip.backends import onnx_cuda, onnx_runtime, select
from tests.support.gpu import fake_tensorrt

HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
launch = ctypes.CDLL(CORE).cudaLaunchHostFunc
launch.argtypes = [ctypes.c_void_p, HostFunction, ctypes.c_void_p]
callbacks: list[object] = []  # kept alive: graphs may call them again


def queue(stream: int, work: Callable[[], None]) -> None:
    function = HostFunction(lambda _: work())
    callbacks.append(function)
    assert launch(stream, function, None) == 0


trt = fake_tensorrt.module(os.environ["EDGECLIP_FAKE_TENSORRT"])
trt._fake.queue = queue
sys.modules[trt.__name__] = trt

open_session = onnx_runtime.open_session


def open_on_cpu(
    path: Any, device: str, threads: Any = None, stream: Any = None, expand: bool = True
) -> Any:
    return open_session(path, "cpu", threads, expand=expand)


onnx_runtime.open_session = open_on_cpu
onnx_cuda.OnnxGpuEncoder.memory = "cpu"
run_encoder = onnx_cuda.OnnxGpuEncoder.enqueue


def enqueue_on_cpu(encoder: Any, count: int) -> None:
    """Run the encoder after the work that was queued before."""
    queue(encoder.stream.handle, lambda: run_encoder(encoder, count))


onnx_cuda.OnnxGpuEncoder.enqueue = enqueue_on_cpu
for module in (select, onnx_runtime):
    module.available_devices = lambda: ["cuda", "cpu"]
