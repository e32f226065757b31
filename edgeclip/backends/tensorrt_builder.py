"""TensorRT engines: built of an ONNX graph on the device that runs them, and kept in a cache.

An engine is made for one TensorRT version and one GPU; it is never shipped. The dtypes are those of
the graph (a strongly typed network), so that no builder flag chooses a precision.
Modules: tensorrt, 10.3 (JetPack 6.1) to 11; tensorrt_rtx, which also builds for a GPU that is not here.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeclip.backends.engine_cache import BuildOptions, EngineCache, EngineKey, Gpu
from edgeclip.errors import DeviceError, EdgeclipError
from edgeclip.storage import write

__all__ = [
    "BuildOptions",
    "EngineCache",
    "EngineKey",
    "Gpu",
    "build_engine",
    "engine_key",
    "import_tensorrt",
    "trt_logger",
]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], object]

MODULES = {
    "tensorrt": (10, 3),
    "tensorrt_rtx": (1, 4),
}  # and the oldest that engines are tried with
INSTALL = {
    "tensorrt": "pip install 'edgeclip[tensorrt]' on a machine with an NVIDIA GPU; on a Jetson it is "
    "JetPack's own, which a virtual environment sees when made by: "
    "python3 -m venv --system-site-packages",
    "tensorrt_rtx": "pip install 'edgeclip[tensorrt-rtx]'",
}
NETWORK_FLAGS = ("STRONGLY_TYPED",)  # EXPLICIT_BATCH has meant nothing since TensorRT 10
# Set by default: products would round to TensorFloat-32, and fp32 miss the golden outputs.
CLEARED_FLAGS = ("TF32",)
# Of TensorRT-RTX: without it an engine allocates as it runs, and cannot be part of a CUDA graph.
SET_FLAGS = ("REQUIRE_USER_ALLOCATION",)
CLASSES = 32768  # most label rows (K, D) of a fused graph


def import_tensorrt(*names: str) -> Any:
    """The first module of MODULES, or of `names`, that is installed.

    Raises DeviceError, which says what to install, for none, or for one that does not work.
    """
    names = names or tuple(MODULES)
    for name in names:
        try:
            trt = importlib.import_module(name)
        except ModuleNotFoundError as err:
            if err.name != name:
                raise DeviceError(f"{name} is installed in part ({err}): {INSTALL[name]}") from err
            continue
        except (ImportError, OSError, RuntimeError) as err:  # of the loader, and of the wheels' own
            raise DeviceError(
                f"{name} is installed, but its libraries do not load ({_line(err)}): install it "
                f"again, {INSTALL[name]}"
            ) from err
        if _version(trt) < MODULES[name]:
            oldest = ".".join(map(str, MODULES[name]))
            raise DeviceError(
                f"{name} {trt.__version__} is too old, edgeclip needs {oldest} or later: "
                f"{INSTALL[name]}"
            )
        return trt
    raise DeviceError(f"{names[0]} is not installed: {INSTALL[names[0]]}")


def engine_key(graph_sha256: Sequence[str], trt: Any, gpu: Gpu, options: BuildOptions) -> EngineKey:
    """The key of the engine that build_engine makes of a graph with these options on `gpu`.

    graph_sha256: of the ONNX file, and of its external data if it has any.
    """
    flags = [name for name in NETWORK_FLAGS if hasattr(trt.NetworkDefinitionCreationFlag, name)]
    flags += [name for name in SET_FLAGS if hasattr(trt.BuilderFlag, name)]
    flags += [f"not {name}" for name in CLEARED_FLAGS if hasattr(trt.BuilderFlag, name)]
    return EngineKey(
        graphs=tuple(graph_sha256),
        module=trt.__name__,
        version=str(trt.__version__),
        capability=(gpu.capability[0], gpu.capability[1]),
        device=gpu.name,
        options=options,
        flags=tuple(flags),
    )


def build_engine(
    graph: Path,
    trt: Any,
    options: BuildOptions,
    *,
    capability: tuple[int, int] | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> bytes:
    """The serialized engine of an ONNX file, for the GPU that CUDA shows first. It may take minutes.

    capability: only with TensorRT-RTX, to build for a GPU that is not here.
    timing_cache: file that spares later builds the timing of the same kernels; made where it is not.
    progress: called with a phase, steps done and steps in all; of phases within another the path,
    joined by " > ". It is called from other threads; what it raises ends the build, as does
    KeyboardInterrupt. Raises DeviceError, with TensorRT's last words, where there is no engine.
    """
    if capability is not None:
        check_capability(trt, capability)
    steps = _Steps(progress or (lambda *_: None))
    # On a thread of its own: Python hears of Ctrl-C only when its main thread is not inside TensorRT.
    with _BUILDING, ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as pool:
        log = trt_logger(trt)
        log.last_error = ""
        job = pool.submit(_build, graph, trt, log, options, capability, timing_cache, steps)
        try:
            return job.result()
        except BaseException:
            steps.stopped = True
            raise


_BUILDING = threading.Lock()  # the logger is one for all, and builds at once would spoil timings


@functools.cache
def trt_logger(trt: Any) -> Any:
    """TensorRT's messages to Python's logging: the one trt.ILogger of this process.

    TensorRT keeps the first logger that it sees. `last_error` is what it said last.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }  # without VERBOSE: thousands of lines

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, level: Any, text: str) -> None:
            number = levels.get(level)
            if number == logging.ERROR:
                self.last_error = _line(text)
            if number is not None:
                logger.log(number, "TensorRT: %s", _line(text))

    return Log()


class _Steps:
    """What a progress monitor is told, put together; phases nest, and come from several threads."""

    def __init__(self, progress: Progress) -> None:
        self.stopped = False
        self.error: BaseException | None = None
        self._progress = progress
        self._phases: dict[str, tuple[str, int]] = {}  # name -> path, steps
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            above = self._phases.get(parent or "")
            path = f"{above[0]} > {name}" if above else name
            self._phases[name] = path, steps
        self._tell(path, 0, steps)

    def complete(self, name: str, step: int) -> bool:
        """Whether to go on."""
        path, steps = self._phases.get(name, (name, step + 1))
        self._tell(path, min(step + 1, steps), steps)
        return not self.stopped

    def finish(self, name: str) -> None:
        with self._lock:
            path, steps = self._phases.pop(name, (name, 1))
        self._tell(path, steps, steps)

    def _tell(self, path: str, done: int, steps: int) -> None:
        if self.stopped:
            return
        try:
            self._progress(path, done, steps)
        except BaseException as err:  # noqa: BLE001  (TensorRT would end the process)
            self.error, self.stopped = err, True


def _monitor(trt: Any, steps: _Steps) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return steps.complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            steps.finish(phase_name)

    return Monitor()


def _build(
    graph: Path,
    trt: Any,
    log: Any,
    options: BuildOptions,
    capability: tuple[int, int] | None,
    timing_cache: Path | None,
    steps: _Steps,
) -> bytes:
    try:
        builder = trt.Builder(log)
    except (TypeError, RuntimeError) as err:  # its constructor gave nothing: most often no driver
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} does not work here: {log.last_error or _line(err)}"
        ) from err
    network = _parse(graph, trt, log, builder)
    for tensor in [network.get_output(i) for i in range(network.num_outputs)]:
        if options.outputs and tensor.name not in options.outputs:
            network.unmark_output(tensor)
    config = builder.create_builder_config()
    monitor = _monitor(trt, steps)  # has to outlive the build
    config.progress_monitor = monitor
    for name in CLEARED_FLAGS:
        if hasattr(trt.BuilderFlag, name):
            config.clear_flag(getattr(trt.BuilderFlag, name))
    for name in SET_FLAGS:
        if hasattr(trt.BuilderFlag, name):
            config.set_flag(getattr(trt.BuilderFlag, name))
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if capability is not None:
        config.num_compute_capabilities = 1
        name = f"SM{capability[0]}{capability[1]}"
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), 0):
            raise DeviceError(f"{trt.__name__} {trt.__version__} does not build for {name}")
    _add_profile(graph, builder, network, config, options)
    timings = timing_cache if _times_kernels(trt) else None
    if timings is not None:
        _load_timings(config, timings, log)
    engine = builder.build_serialized_network(network, config)
    if steps.error is not None:
        raise steps.error
    if engine is None:
        reason = log.last_error or "it gave no reason"
        raise DeviceError(f"{trt.__name__} {trt.__version__} built no engine of {graph}: {reason}")
    if timings is not None:
        _store_timings(config, timings)
    return bytes(engine)


def _parse(graph: Path, trt: Any, log: Any, builder: Any) -> Any:
    if not graph.is_file():
        raise DeviceError(f"{graph} does not exist: there is nothing to build an engine of")
    flags = 0
    for name in NETWORK_FLAGS:
        if hasattr(trt.NetworkDefinitionCreationFlag, name):
            flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = Counter(_parser_error(parser.get_error(i)) for i in range(parser.num_errors))
        each = [f"{text} ({n} times)" if n > 1 else text for text, n in errors.items()]
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} cannot read {graph}: "
            f"{'; '.join(each) or log.last_error or 'it gave no reason'}"
        )
    return network


def _parser_error(error: Any) -> str:
    """In a line: "MatMulInteger: checkMatMulInteger, UNSUPPORTED_NODE_DATATYPE: false"."""
    operator, code = error.node_operator(), getattr(error.code(), "name", "")
    where = ", ".join(text for text in (error.func(), code) if text)
    return ": ".join(_line(text) for text in (operator, where, error.desc()) if text)


def capabilities(trt: Any) -> list[tuple[int, int]]:
    """Of the GPUs that need not be here to build for: TensorRT-RTX's, none of TensorRT's."""
    names = dir(getattr(trt, "ComputeCapability", None))
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch("SM[0-9]+", name))
    return [divmod(number, 10) for number in numbers]


def check_capability(trt: Any, capability: tuple[int, int]) -> None:
    """Raises DeviceError unless `trt` builds for such a GPU where it is not."""
    known = capabilities(trt)
    if not known:
        raise DeviceError(
            f"{trt.__name__} builds for the GPU of this machine only; for another, "
            f"TensorRT-RTX: {INSTALL['tensorrt_rtx']}"
        )
    if capability not in known:
        names = ", ".join(f"SM{major}{minor}" for major, minor in known)
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} builds for {names}, not "
            f"SM{capability[0]}{capability[1]}"
        )


def _add_profile(
    graph: Path, builder: Any, network: Any, config: Any, options: BuildOptions
) -> None:
    """The smallest, usual and largest sizes of every input that has symbolic ones."""
    profile, used = builder.create_optimization_profile(), False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        ranges = _ranges(network, tensor.name, options)
        sizes = []
        for axis, size in enumerate(tensor.shape):
            if size == -1 and axis not in ranges:
                raise DeviceError(
                    f"{graph}: TensorRT needs a range for axis {axis} of input {tensor.name!r}"
                )
            sizes.append(ranges[axis] if size == -1 else (size, size, size))
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *zip(*sizes, strict=True))
            used = True
    if used and config.add_optimization_profile(profile) < 0:
        raise DeviceError(f"TensorRT takes no profile of {graph}")


def _ranges(network: Any, name: str, options: BuildOptions) -> dict[int, tuple[int, int, int]]:
    """The sizes of an input by axis, where they are symbolic."""
    most, length = options.max_batch, options.context_length
    if name == "ids":  # label prompts come many at a time
        return {0: (1, most, most), 1: (1, min(16, length), length)}
    if name == "classes":  # as many at least as there are in an answer: outputs (N, k)
        k = max(network.get_output(i).shape[-1] for i in range(network.num_outputs))
        return {0: (max(k, 1), max(k, 100), CLASSES)}
    return {0: (1, options.opt_batch, most)}


def _times_kernels(trt: Any) -> bool:
    """Not so TensorRT-RTX, whose timing caches hold nothing and are deprecated."""
    return not capabilities(trt)


def _load_timings(config: Any, path: Path, log: Any) -> None:
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    for data in (known, b"") if known else (b"",):
        with suppress(TypeError, RuntimeError, ValueError):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return
        logger.info("%s is of another TensorRT or GPU, or damaged: timing kernels again", path)
        log.last_error = ""


def _store_timings(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, bytes(cache.serialize()))
    except (OSError, EdgeclipError) as err:  # costs time, never an engine
        logger.warning("cannot keep kernel timings: %s", err)


def _version(trt: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", str(trt.__version__))[:2])


def _line(text: object) -> str:
    return " ".join(str(text).split())
