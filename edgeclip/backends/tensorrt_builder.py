"""Builder of TensorRT engines, from an ONNX graph, on the device that runs them.

An engine fits one TensorRT version and one GPU, so it is never shipped. Its dtypes are those of the
graph (a strongly typed network): no builder flag selects a precision.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeclip.backends.engine_cache import BuildOptions, EngineKey, Gpu
from edgeclip.backends.tensorrt_module import (
    capabilities,
    check_capability,
    one_line,
    trt_logger,
)
from edgeclip.errors import DeviceError, EdgeclipError
from edgeclip.storage import write

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], object]

NETWORK_FLAGS = ("STRONGLY_TYPED",)  # EXPLICIT_BATCH has no effect since TensorRT 10
# Set by default; TensorFloat-32 rounds products, and fp32 would miss the golden outputs.
CLEARED_FLAGS = ("TF32",)
# TensorRT-RTX only: otherwise an engine allocates while it runs, and no CUDA graph can capture it.
SET_FLAGS = ("REQUIRE_USER_ALLOCATION",)
CLASSES = 32768  # most label rows (K, D) of a fused graph

_lock = threading.Lock()  # builds share the logger, and concurrent ones distort kernel timings


def engine_key(graph_sha256: Sequence[str], trt: Any, gpu: Gpu, options: BuildOptions) -> EngineKey:
    """Return the key of the engine that build_engine builds with these options on `gpu`.

    graph_sha256: hashes of the ONNX file, and of its external data if there is any.
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
    """Build an ONNX file for CUDA's first GPU, and return the serialized engine. It may take minutes.

    capability: of an absent GPU to build for; TensorRT-RTX only.
    timing_cache: file of kernel timings, read and updated, so that later builds are faster.
    progress: called from other threads with a phase, its finished steps and its steps; the name of a
    nested phase is its path, joined by " > ". An exception in it stops the build, as does
    KeyboardInterrupt. Raises DeviceError, with TensorRT's last error, if the build fails.
    """
    if capability is not None:
        check_capability(trt, capability)
    steps = _Steps(progress or (lambda *_: None))
    # In another thread: Python handles Ctrl-C only while its main thread is not inside TensorRT.
    with _lock, ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as pool:
        log = trt_logger(trt)
        log.last_error = ""
        job = pool.submit(_build, graph, trt, log, options, capability, timing_cache, steps)
        try:
            return job.result()
        except BaseException:
            steps.stopped = True
            raise


class _Steps:
    """Aggregator of TensorRT's nested progress callbacks, which come from several threads."""

    def __init__(self, progress: Progress) -> None:
        self.stopped = False
        self.error: BaseException | None = None
        self._progress = progress
        self._phases: dict[str, tuple[str, int]] = {}  # name -> path, steps
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            outer = self._phases.get(parent or "")
            path = f"{outer[0]} > {name}" if outer else name
            self._phases[name] = path, steps
        self._report(path, 0, steps)

    def complete(self, name: str, step: int) -> bool:
        """Report a finished step; return whether the build goes on."""
        path, steps = self._phases.get(name, (name, step + 1))
        self._report(path, min(step + 1, steps), steps)
        return not self.stopped

    def finish(self, name: str) -> None:
        with self._lock:
            path, steps = self._phases.pop(name, (name, 1))
        self._report(path, steps, steps)

    def _report(self, path: str, done: int, steps: int) -> None:
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
    except (
        TypeError,
        RuntimeError,
    ) as err:  # the constructor returned nullptr, mostly without a driver
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} does not work here: {log.last_error or one_line(err)}"
        ) from err
    network = _parse(graph, trt, log, builder)
    for tensor in [network.get_output(i) for i in range(network.num_outputs)]:
        if options.outputs and tensor.name not in options.outputs:
            network.unmark_output(tensor)
    config = _config(trt, builder, options, capability)
    monitor = _monitor(trt, steps)  # must outlive the build
    config.progress_monitor = monitor
    _add_profile(graph, builder, network, config, options)
    timings = None if capabilities(trt) else timing_cache  # TensorRT-RTX has no kernel timings
    if timings is not None:
        _load_timings(config, timings, log)
    engine = builder.build_serialized_network(network, config)
    if steps.error is not None:
        raise steps.error
    if engine is None:
        reason = log.last_error or "no reason given"
        raise DeviceError(f"{trt.__name__} {trt.__version__} cannot build {graph}: {reason}")
    if timings is not None:
        _store_timings(config, timings)
    return bytes(engine)


def _config(
    trt: Any, builder: Any, options: BuildOptions, capability: tuple[int, int] | None
) -> Any:
    config = builder.create_builder_config()
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
    return config


def _parse(graph: Path, trt: Any, log: Any, builder: Any) -> Any:
    if not graph.is_file():
        raise DeviceError(f"{graph} does not exist: name an ONNX file")
    flags = 0
    for name in NETWORK_FLAGS:
        if hasattr(trt.NetworkDefinitionCreationFlag, name):
            flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = Counter(_parser_error(parser.get_error(i)) for i in range(parser.num_errors))
        lines = [f"{text} ({n} times)" if n > 1 else text for text, n in errors.items()]
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} cannot read {graph}: "
            f"{'; '.join(lines) or log.last_error or 'no reason given'}"
        )
    return network


def _parser_error(error: Any) -> str:
    """Return a line such as "MatMulInteger: checkMatMulInteger, UNSUPPORTED_NODE_DATATYPE: false"."""
    operator, code = error.node_operator(), getattr(error.code(), "name", "")
    where = ", ".join(text for text in (error.func(), code) if text)
    return ": ".join(one_line(text) for text in (operator, where, error.desc()) if text)


def _add_profile(
    graph: Path, builder: Any, network: Any, config: Any, options: BuildOptions
) -> None:
    """Add the smallest, usual and largest shape of each input with symbolic sizes."""
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
        raise DeviceError(f"TensorRT rejects the optimization profile of {graph}")


def _ranges(network: Any, name: str, options: BuildOptions) -> dict[int, tuple[int, int, int]]:
    """Return axis -> smallest, usual and largest size, for the axes that may be symbolic."""
    largest, length = options.max_batch, options.context_length
    if name == "ids":  # prompts are encoded in large batches
        return {0: (1, largest, largest), 1: (1, min(16, length), length)}
    if name == "classes":  # at least k, for outputs (N, k)
        k = max(network.get_output(i).shape[-1] for i in range(network.num_outputs))
        return {0: (max(k, 1), max(k, 100), CLASSES)}
    return {0: (1, options.opt_batch, largest)}


def _load_timings(config: Any, path: Path, log: Any) -> None:
    try:
        stored = path.read_bytes()
    except OSError:
        stored = b""
    for data in (stored, b"") if stored else (b"",):
        with suppress(TypeError, RuntimeError, ValueError):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return
        logger.info("%s is damaged, or from another TensorRT or GPU: timing kernels again", path)
        log.last_error = ""


def _store_timings(config: Any, path: Path) -> None:
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, bytes(cache.serialize()))
    except (OSError, EdgeclipError) as err:  # the engine is fine without
        logger.warning("cannot write kernel timings, later builds take longer: %s", err)
