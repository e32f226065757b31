"""ONNX Runtime: sessions, and encoders with input and output on the host."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeclip.backends.base import EMBEDDING
from edgeclip.errors import BundleError, DeviceError
from edgeclip.host import cores

if TYPE_CHECKING:
    import onnxruntime as ort

# TensorFloat-32, the default, rounds products to ten bits and misses the golden outputs.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


def import_onnxruntime() -> Any:
    """Return the onnxruntime module. Raises DeviceError if it is not installed."""
    try:
        import onnxruntime
    except ImportError as err:
        raise DeviceError(
            "ONNX Runtime is not installed: pip install 'edgeclip[cpu]', "
            "or 'edgeclip[gpu]' on a machine with an NVIDIA GPU (one of the two, not both)"
        ) from err
    return onnxruntime


def available_devices() -> list[str]:
    """Return the devices of the installed ONNX Runtime, best first."""
    providers = import_onnxruntime().get_available_providers()
    return ["cuda", "cpu"] if "CUDAExecutionProvider" in providers else ["cpu"]


def open_session(
    path: Path,
    device: str,
    threads: int | None = None,
    stream: int | None = None,
    expand: bool = True,
) -> ort.InferenceSession:
    """Open a session on a graph. Arguments and errors: see OnnxEncoder."""
    ort = import_onnxruntime()
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in ort.get_available_providers():
        raise DeviceError(
            f"device {device!r} needs ONNX Runtime's {provider}, which is not installed: "
            "pip uninstall onnxruntime, then pip install 'edgeclip[gpu]'"
        )
    options = dict(PROVIDER_OPTIONS[device])
    if stream is not None:
        options["user_compute_stream"] = str(stream)
    settings = _session_options(ort, threads)
    try:
        session = ort.InferenceSession(
            str(path),
            settings,
            providers=[(provider, options)],
            enable_fallback=0,
            disabled_optimizers=None if expand else ["ConstantFolding"],
        )
    except Exception as err:  # the library has no public base class for its errors
        error = BundleError if device == "cpu" else DeviceError
        raise error(f"{path} does not load on {device}: {first_line(err)}") from err
    if session.get_providers()[0] != provider:  # ONNX Runtime only logs that it falls back
        raise DeviceError(f"device {device!r} does not work here: see edgeclip doctor")
    session.disable_fallback()  # a failed run would be repeated on the CPU, and printed
    return session


class Session:
    """An ONNX Runtime session that is opened again after a fork, which loses its threads.

    Arguments and errors: see `open_session`.
    """

    _all: ClassVar[weakref.WeakSet[Session]] = weakref.WeakSet()

    def __init__(
        self,
        path: Path,
        device: str,
        threads: int | None = None,
        stream: int | None = None,
        expand: bool = True,
    ) -> None:
        self._arguments = path, device, threads, stream, expand
        self._open()

    def _open(self) -> None:
        self._session = open_session(*self._arguments)
        self._process = os.getpid()
        self._all.add(self)

    def get(self) -> ort.InferenceSession:
        """Return the session of this process."""
        if self._process != os.getpid():
            self._open()
        return self._session

    @classmethod
    def keep(cls) -> None:
        """Keep the parent process's sessions to the end: their destructor would wait for its threads."""
        for session in cls._all:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(session._session))


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=Session.keep)


def run_session(
    session: ort.InferenceSession,
    outputs: Sequence[str],
    inputs: Mapping[str, NDArray[Any]],
    path: Path,
    device: str,
) -> list[NDArray[np.float32]]:
    """Return the named outputs. Raises DeviceError."""
    try:
        arrays: list[NDArray[np.float32]] = session.run(list(outputs), dict(inputs))
    except Exception as err:  # the library has no public base class for its errors
        raise DeviceError(f"{path.name} failed on {device}: {first_line(err)}") from err
    return arrays


class OnnxEncoder:
    """An encoder run by ONNX Runtime. May be shared by threads.

    device: cpu or cuda. threads: threads of one call; None: one per usable core. stream: CUDA stream;
    None: ONNX Runtime's own. output: embedding, or tokens for the graph of the image tokens
    (N, prefix + P, D). expand: convert int8 weights to float32 once, when the file is opened, not in
    each run: for many runs it is faster, for few slower, and it takes five times their memory.
    Raises DeviceError if the device does not work, BundleError if the file does not load.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        threads: int | None = None,
        stream: int | None = None,
        output: str = EMBEDDING,
        expand: bool = True,
    ) -> None:
        self._opened = Session(path, device, threads, stream, expand)
        self._path, self._device, self._output = path, device, output
        (node, *_) = self._session.get_inputs()
        self._input = node.name
        # A transformer's int8 image encoder has batch size 1: it quantises by its whole input's range.
        self._batch = node.shape[0] if isinstance(node.shape[0], int) else None

    def check_shapes(self, inputs: tuple[int, ...], embed_dim: int) -> None:
        """Raise BundleError unless the graph maps (N, *inputs) to (N, embed_dim).

        Symbolic sizes of the graph match any size.
        """
        (source,) = (node.shape for node in self._session.get_inputs())
        result = self._output_shape()
        pairs = [*zip(source[1:], inputs, strict=False), (result[-1], embed_dim)]
        if len(source) != len(inputs) + 1 or any(isinstance(a, int) and a != b for a, b in pairs):
            raise BundleError(
                f"{self._path} maps {source} to {result}, which contradicts the manifest: export the "
                "bundle again"
            )

    @property
    def _session(self) -> ort.InferenceSession:
        return self._opened.get()

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """Return the output for inputs (N, ...): embeddings (N, D), not normalised, or tokens."""
        session, outputs = self._session, (self._output,)
        count = self._batch or max(len(inputs), 1)
        batches = [{self._input: inputs[i : i + count]} for i in range(0, len(inputs), count)]
        rows = [run_session(session, outputs, x, self._path, self._device)[0] for x in batches]
        if len(rows) == 1:
            return rows[0]
        if not rows:
            return np.empty((0, *self._output_shape()[1:]), np.float32)
        return np.concatenate(rows)

    def _output_shape(self) -> list[Any]:
        nodes = self._session.get_outputs()
        shapes = [node.shape for node in nodes if node.name == self._output]
        if not shapes:
            names = ", ".join(node.name for node in nodes)
            raise BundleError(f"{self._path} has no output {self._output}, but {names}")
        shape: list[Any] = shapes[0]
        return shape


def _session_options(ort: Any, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    # Never 0: ONNX Runtime would use all of the machine's cores and pin threads to them.
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    return options


def first_line(err: Exception) -> str:
    return str(err).partition("\n")[0]
