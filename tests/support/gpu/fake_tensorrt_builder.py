"""Classes of fake_tensorrt that build engines: parser, network, configuration and builder.

`self._trt` is the module that a class belongs to.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

UNSUPPORTED = ("DynamicQuantizeLinear", "MatMulInteger")  # operators that TensorRT does not parse


class Builder:
    def __init__(self, logger: Any) -> None:
        if not isinstance(logger, self._trt.ILogger):
            raise TypeError("Builder(): incompatible constructor arguments")
        self._logger = logger
        if not self._trt._fake.driver:
            self._error("CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> Any:
        network = self._trt.INetworkDefinition()
        network._flags = [x.name for x in self._trt.NetworkDefinitionCreationFlag if flags >> x & 1]
        return network

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        fake, severity = self._trt._fake, self._trt.ILogger.Severity
        fake.cancelled = False
        if fake.warns:
            self._logger.log(severity.WARNING, fake.warns)
        problem = _problem(network, config) or fake.refuses
        if not self._report(config):
            fake.cancelled, problem = True, "the build was cancelled"
        if problem:
            self._error(problem)
            return None
        built = {
            "graph": str(network._graph),
            "outputs": [tensor.name for tensor in network._outputs],
            "version": self._trt.__version__,
            "network_flags": network._flags,
            "builder_flags": sorted(x.name for x in config._flags),
            "pools": {pool.name: size for pool, size in config._pools.items()},
            "optimization_level": config.builder_optimization_level,
            "profiles": [profile._shapes for profile in config._profiles],
            "capabilities": [x.name for x in config._capabilities],
            "known_timings": config._timings and config._timings._entries.decode(),
        }
        if config._timings is not None:
            config._timings._entries += network._graph.name.encode() + b"\n"
        fake.builds.append(built)
        memory = self._trt.IHostMemory()
        memory._data = json.dumps(built).encode()
        return memory

    def _report(self, config: Any) -> bool:
        """Report nested phases to the progress monitor; return whether the build goes on."""
        monitor = config.progress_monitor
        if monitor is None:
            return True
        goes_on = True
        monitor.phase_start("Building engine", None, 1)
        monitor.phase_start("Timing graph nodes", "Building engine", self._trt._fake.steps)
        for step in range(self._trt._fake.steps):
            goes_on = monitor.step_complete("Timing graph nodes", step)
            if not goes_on:
                break
        monitor.phase_finish("Timing graph nodes")
        goes_on = goes_on and monitor.step_complete("Building engine", 0)
        monitor.phase_finish("Building engine")
        return goes_on

    def _error(self, text: str) -> None:
        self._logger.log(self._trt.ILogger.Severity.ERROR, text)


def _problem(network: Any, config: Any) -> str:
    """Return why TensorRT would refuse to build the network, or ""."""
    if not network._outputs:
        return "Network must have at least one output"
    for tensor in network._inputs:
        if -1 not in tensor.shape:
            continue
        ranges = [p._shapes[tensor.name] for p in config._profiles if tensor.name in p._shapes]
        if not ranges:
            return f"input {tensor.name} has dynamic sizes, and no profile"
        for size, low, usual, high in zip(tensor.shape, *ranges[0], strict=True):
            ordered = 1 <= low <= usual <= high
            if not ordered or (size != -1 and (low, high) != (size, size)):
                return f"the profile of {tensor.name} does not fit {tensor.shape}"
    return ""


class INetworkDefinition:
    def __init__(self) -> None:
        self._graph: Path | None = None
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def unmark_output(self, tensor: Any) -> None:
        self._outputs.remove(tensor)


class ITensor:
    name = ""
    shape: tuple[int, ...] = ()


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]


class IBuilderConfig:
    progress_monitor: Any = None
    builder_optimization_level = 3
    num_compute_capabilities = 0

    def __init__(self) -> None:
        self._flags = {self._trt.BuilderFlag.TF32}  # on by default
        self._pools: dict[Any, int] = {}
        self._profiles: list[Any] = []
        self._timings: Any = None
        self._capabilities: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._trt.BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self._trt.BuilderFlag(flag))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[self._trt.MemoryPoolType(pool)] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def set_compute_capability(self, capability: Any, index: int) -> bool:
        if index >= self.num_compute_capabilities:
            return False
        self._capabilities.append(self._trt.ComputeCapability(capability))
        return True

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        """Read the bytes of a timing cache, or none; return None for others."""
        data = bytes(serialized_timing_cache)
        cache = self._trt.ITimingCache()
        cache._head, _, cache._entries = (
            data.partition(b"\n") if data else (_head(self._trt), b"", b"")
        )
        return cache if cache._head.startswith(b"timings ") else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and cache._head != _head(self._trt):
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._timings


def _head(trt: ModuleType) -> bytes:
    return f"timings {trt.__version__} {trt._fake.device}".encode()


class ITimingCache:
    def serialize(self) -> Any:
        memory = self._trt.IHostMemory()
        memory._data = self._head + b"\n" + self._entries
        return memory


class IHostMemory:
    _data = b""

    @property
    def nbytes(self) -> int:
        return len(self._data)

    def __bytes__(self) -> bytes:
        return self._data


class ILogger:
    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    pass


class OnnxParser:
    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[Any] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def parse_from_file(self, model: str) -> bool:
        code = self._trt.ErrorCode
        try:
            proto = onnx.load(model)  # with its external data
        except Exception as err:  # noqa: BLE001  (from protobuf, onnx or the file system)
            self._fail("", "deserializeOnnxModel", code.MODEL_DESERIALIZE_FAILED, str(err))
            return False
        for node in proto.graph.node:
            if node.op_type in UNSUPPORTED:
                self._fail(node.op_type, f"check{node.op_type}", code.UNSUPPORTED_NODE, "false")
        if self._errors:
            return False
        network = self._network
        network._graph = Path(model).resolve()
        network._inputs = [self._tensor(value) for value in proto.graph.input]
        network._outputs = [self._tensor(value) for value in proto.graph.output]
        return True

    def _tensor(self, value: onnx.ValueInfoProto) -> Any:
        tensor = self._trt.ITensor()
        tensor.name = value.name
        dims = value.type.tensor_type.shape.dim
        tensor.shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
        return tensor

    def _fail(self, operator: str, function: str, code: Any, text: str) -> None:
        error = self._trt.ParserError()
        error._fields = (operator, function, code, text)
        self._errors.append(error)
        self._logger.log(self._trt.ILogger.Severity.ERROR, f"{operator}: {text}")


class ParserError:
    def node_operator(self) -> str:
        return self._fields[0]

    def func(self) -> str:
        return self._fields[1]

    def code(self) -> Any:
        return self._fields[2]

    def desc(self) -> str:
        return self._fields[3]


CLASSES = (
    Builder,
    IBuilderConfig,
    IHostMemory,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    IProgressMonitor,
    ITensor,
    ITimingCache,
    OnnxParser,
    ParserError,
)
