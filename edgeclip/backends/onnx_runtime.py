"""Encoders: an array in, embeddings out, by ONNX Runtime. TensorRT's are in edgeclip.backends.tensorrt_encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.backends.base import EMBEDDING
from edgeclip.errors import BundleError, DeviceError
from edgeclip.host import cores

if TYPE_CHECKING:
    import onnxruntime as ort

# fp32 means it: by default products round to TensorFloat-32, ten bits, and miss the golden outputs.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises DeviceError where neither of its packages is installed."""
    try:
        import onnxruntime
    except ImportError as err:
        raise DeviceError(
            "ONNX Runtime is not installed: pip install 'edgeclip[cpu]', "
            "or 'edgeclip[gpu]' on a machine with an NVIDIA GPU (one of the two, not both)"
        ) from err
    return onnxruntime


def available_devices() -> list[str]:
    """The devices that an encoder can be asked to run on here, the best first."""
    providers = import_onnxruntime().get_available_providers()
    return ["cuda", "cpu"] if "CUDAExecutionProvider" in providers else ["cpu"]


def open_session(
    path: Path,
    device: str,
    threads: int | None = None,
    stream: int | None = None,
) -> ort.InferenceSession:
    """Open a graph in ONNX Runtime. The arguments and errors are those of OnnxEncoder."""
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
        )
    except Exception as err:  # the library has no public base class for its errors
        error = BundleError if device == "cpu" else DeviceError
        raise error(f"{path} does not load on {device}: {first_line(err)}") from err
    if session.get_providers()[0] != provider:  # it falls back with only a log line
        raise DeviceError(f"device {device!r} does not work here: see edgeclip doctor")
    session.disable_fallback()  # it would go on elsewhere, and say so on stdout
    return session


class Session:
    """A graph in ONNX Runtime, opened again in a forked process, which has no threads of the parent.

    The arguments, and what is raised, as for `open_session`.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        threads: int | None = None,
        stream: int | None = None,
    ) -> None:
        self._arguments = path, device, threads, stream
        self._open()

    def _open(self) -> None:
        self._session = open_session(*self._arguments)
        self._process = os.getpid()

    def get(self) -> ort.InferenceSession:
        """Return the session of this process."""
        if self._process != os.getpid():
            _forked.append(self._session)
            self._open()
        return self._session


_forked: list[
    ort.InferenceSession
] = []  # never destroyed: that would wait for the parent's threads


def run_session(
    session: ort.InferenceSession,
    outputs: Sequence[str],
    inputs: Mapping[str, NDArray[Any]],
    path: Path,
    device: str,
) -> list[NDArray[np.float32]]:
    """The outputs named. Raises DeviceError."""
    try:
        found: list[NDArray[np.float32]] = session.run(list(outputs), dict(inputs))
    except Exception as err:  # the library has no public base class for its errors
        raise DeviceError(f"{path.name} failed on {device}: {first_line(err)}") from err
    return found


class OnnxEncoder:
    """An encoder run by ONNX Runtime. May be shared by threads.

    device is cpu or cuda; threads is the number used inside one call, None for one per usable core;
    stream is the CUDA stream to run on, None for one of ONNX Runtime's own. output is embedding, or
    tokens for the graph of the image tokens (N, prefix + P, D).
    Raises DeviceError where the device does not work, BundleError where the file does not load.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        threads: int | None = None,
        stream: int | None = None,
        output: str = EMBEDDING,
    ) -> None:
        self._opened = Session(path, device, threads, stream)
        self._path, self._device, self._output = path, device, output
        (taken, *_) = self._session.get_inputs()
        self._input = taken.name
        # An int8 graph takes its inputs one by one: its ranges would be those of all of them.
        self._batch = taken.shape[0] if isinstance(taken.shape[0], int) else None

    def check_shapes(self, inputs: tuple[int, ...], embed_dim: int) -> None:
        """Raises BundleError where the graph is not made for inputs (N, *inputs), or for embed_dim.

        Sizes that are symbolic in the graph fit all.
        """
        (taken,) = (node.shape for node in self._session.get_inputs())
        given = self._output_shape()
        pairs = [*zip(taken[1:], inputs, strict=False), (given[-1], embed_dim)]
        if len(taken) != len(inputs) + 1 or any(isinstance(a, int) and a != b for a, b in pairs):
            raise BundleError(
                f"{self._path} takes {taken} and gives {given}, which is not what the manifest says"
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
    options.log_severity_level = 3  # errors; what matters is raised
    # Never 0, for which ONNX Runtime takes the machine's cores, and pins threads to them.
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    return options


def first_line(err: Exception) -> str:
    return str(err).partition("\n")[0]
