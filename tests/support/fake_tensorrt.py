"""A module of exactly the names that a TensorRT has, which builds engines of another kind.

    trt = fake_tensorrt.module("tensorrt-10.3.0")

The names come from tests/support/tensorrt_surfaces. What is not there is an AttributeError, as is what is there
and that this file has no behaviour for (when it is called). Its builder checks what it is given as far
as TensorRT's would: a sound ONNX file, a profile that fits each symbolic size; and its engine is JSON
that says how it was built, which its runtime runs by ONNX Runtime on the CPU. `trt._fake` is what tests look at and change.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

SURFACES = Path(__file__).parent / "tensorrt_surfaces"
UNSUPPORTED = ("DynamicQuantizeLinear", "MatMulInteger")  # as TensorRT has it


@dataclass
class Fake:
    """How the module behaves, and what was asked of it."""

    driver: bool = True
    refuses: str = ""  # the error that every build ends with
    warns: str = ""
    steps: int = 3  # of the longest phase of a build
    device: str = "GPU"  # whose timings it takes
    builds: list[dict[str, Any]] = field(default_factory=list)  # what the engines say
    cancelled: bool = False  # whether the last build was
    queue: Callable[[int, Callable[[], None]], None] = lambda _, work: work()  # on a stream


def surfaces() -> list[str]:
    return sorted(path.stem for path in SURFACES.glob("*.json"))


def module(name: str) -> ModuleType:
    """A new module with the names of a surface."""
    surface = json.loads((SURFACES / f"{name}.json").read_text())
    trt = ModuleType(surface["module"])
    trt.__version__ = surface["version"]
    trt._fake = Fake()
    for attribute in surface["names"]:
        setattr(trt, attribute, None)
    enums = {
        key: enum.IntEnum(key.split(".")[-1], members) for key, members in surface["enums"].items()
    }
    for key, found in enums.items():
        if "." not in key:
            setattr(trt, key, found)
    for key, members in surface["classes"].items():
        setattr(trt, key, _restricted(trt, key, members))
    for owner in (trt.ILogger, trt.Logger):
        owner.Severity = enums["ILogger.Severity"]
        for member in owner.Severity:
            setattr(owner, member.name, member)
    return trt


def _restricted(trt: ModuleType, name: str, members: Sequence[str]) -> type:
    """The class with just these members, and the behaviour of the one here, if there is one."""
    behaviour = BEHAVIOURS.get(name, object)
    space: dict[str, Any] = {member: _missing(name, member) for member in members}
    for key, value in vars(behaviour).items():
        if key in members or key.startswith("_"):
            space[key] = value
    space |= {"_trt": trt, "_known": frozenset(members), "__setattr__": _set}
    for key in ("__dict__", "__weakref__"):
        space.pop(key, None)
    return type(name, (), space)


def _missing(owner: str, name: str) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise NotImplementedError(f"tests/support/fake_tensorrt.py: {owner}.{name}")

    return call


def _set(self: Any, name: str, value: object) -> None:
    """As a class of an extension module, which takes no attribute that it does not know; its
    subclasses in Python do."""
    own = "_known" in vars(type(self))
    if own and not name.startswith("_") and name not in self._known:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    object.__setattr__(self, name, value)


class Builder:
    def __init__(self, logger: Any) -> None:
        if not isinstance(logger, self._trt.ILogger):
            raise TypeError("Builder(): incompatible constructor arguments")
        self._logger = logger
        if not self._trt._fake.driver:
            self._error("CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int = 0) -> Any:
        made = self._trt.INetworkDefinition()
        made._flags = [x.name for x in self._trt.NetworkDefinitionCreationFlag if flags >> x & 1]
        return made

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
        """To the progress monitor, phases within phases; whether to go on."""
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
    """What TensorRT refuses to build."""
    if not network._outputs:
        return "Network must have at least one output"
    for tensor in network._inputs:
        if -1 not in tensor.shape:
            continue
        found = [p._shapes[tensor.name] for p in config._profiles if tensor.name in p._shapes]
        if not found:
            return f"input {tensor.name} has dynamic sizes, and no profile"
        for size, low, usual, high in zip(tensor.shape, *found[0], strict=True):
            good = 1 <= low <= usual <= high
            if not good or (size != -1 and (low, high) != (size, size)):
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
        """Of the bytes of one, or of none; not of any others."""
        data = bytes(serialized_timing_cache)
        made = self._trt.ITimingCache()
        made._head, _, made._entries = (
            data.partition(b"\n") if data else (_head(self._trt), b"", b"")
        )
        return made if made._head.startswith(b"timings ") else None

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
            found = onnx.load(model)  # with its external data
        except Exception as err:  # noqa: BLE001  (protobuf's, onnx's, the file system's)
            self._fail("", "deserializeOnnxModel", code.MODEL_DESERIALIZE_FAILED, str(err))
            return False
        for node in found.graph.node:
            if node.op_type in UNSUPPORTED:
                self._fail(node.op_type, f"check{node.op_type}", code.UNSUPPORTED_NODE, "false")
        if self._errors:
            return False
        network = self._network
        network._graph = Path(model).resolve()
        network._inputs = [self._tensor(value) for value in found.graph.input]
        network._outputs = [self._tensor(value) for value in found.graph.output]
        return True

    def _tensor(self, value: onnx.ValueInfoProto) -> Any:
        made = self._trt.ITensor()
        made.name = value.name
        dims = value.type.tensor_type.shape.dim
        made.shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
        return made

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


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        """ONNX Runtime on the CPU, on the graph that was built."""
        try:
            built = json.loads(serialized_engine)
            if built["version"] != self._trt.__version__:
                raise ValueError("The engine plan file is not compatible with this version")
        except ValueError as err:
            self._logger.log(self._trt.ILogger.Severity.ERROR, str(err))
            return None
        engine = self._trt.ICudaEngine()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        engine._session = ort.InferenceSession(built["graph"], options)
        engine._built = built
        return engine


class ICudaEngine:
    device_memory_size_v2 = 4096

    @property
    def num_io_tensors(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return [node.name for node in self._session.get_inputs()] + self._built["outputs"]

    def get_tensor_name(self, index: int) -> str:
        return self._names()[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        nodes = (*self._session.get_inputs(), *self._session.get_outputs())
        (shape,) = (node.shape for node in nodes if node.name == name)
        return tuple(size if isinstance(size, int) else -1 for size in shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._built["profiles"][profile_index][name]]

    def create_execution_context(self, strategy: Any) -> Any:
        context = self._trt.IExecutionContext()
        context._engine, context._strategy = self, strategy
        context._shapes, context._addresses = {}, {}
        context._profile = context._memory = None
        return context


class IExecutionContext:
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine._names()

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory if size >= self._engine.device_memory_size_v2 else None

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queued, as the work of a GPU is, so that a graph that captures it runs it again."""
        managed = self._strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._profile is None or (managed and self._memory is None):
            return False
        self._trt._fake.queue(stream_handle, self._run)
        return True

    def _run(self) -> None:
        (node,) = self._engine._session.get_inputs()
        pixels = _floats(self._addresses[node.name], self._shapes[node.name])
        names = self._engine._built["outputs"]
        for name, value in zip(
            names, self._engine._session.run(names, {node.name: pixels}), strict=True
        ):
            _floats(self._addresses[name], value.shape)[...] = value


def _floats(address: int, shape: Sequence[int]) -> Any:
    kind = ctypes.c_float * math.prod(shape)
    return np.ctypeslib.as_array(kind.from_address(address)).reshape(shape)


BEHAVIOURS: dict[str, type] = {
    found.__name__: found
    for found in (
        Builder,
        IBuilderConfig,
        ICudaEngine,
        IExecutionContext,
        IHostMemory,
        ILogger,
        INetworkDefinition,
        IOptimizationProfile,
        IProgressMonitor,
        ITensor,
        ITimingCache,
        OnnxParser,
        ParserError,
        Runtime,
    )
}
