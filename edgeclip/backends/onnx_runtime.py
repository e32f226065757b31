"""Encoders: an array in, embeddings out, by ONNX Runtime. TensorRT's are in edgeclip.backends.tensorrt_encoder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import BundleError, DeviceError
from edgeclip.host import cores
from edgeclip.onnx_file import without_output

if TYPE_CHECKING:
    import onnxruntime as ort

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

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
    without: str = "",
) -> ort.InferenceSession:
    """A graph in ONNX Runtime, except for the output `without`, and what only that needs.

    ONNX Runtime computes all that is in a graph, whatever it is asked for. The rest, and what is
    raised, as for OnnxEncoder.
    """
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
        model: str | bytes = str(path)
        if without:
            model = without_output(path, without)
            settings.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
        session = ort.InferenceSession(
            model,
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
        without: str = "",
    ) -> None:
        self._arguments = path, device, threads, stream, without
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

    device is cpu or cuda; threads is the number used inside one call, None for one per usable core; stream
    is the CUDA stream to run on, None for one of ONNX Runtime's own.
    Raises DeviceError where the device does not work, BundleError where the file does not load.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        threads: int | None = None,
        stream: int | None = None,
    ) -> None:
        self._opened = Session(path, device, threads, stream, without="tokens")
        self._path, self._device, self._threads = path, device, threads
        (taken, *_) = self._session.get_inputs()
        self._input = taken.name
        # An int8 graph takes its inputs one by one: its ranges would be those of all of them.
        self._batch = taken.shape[0] if isinstance(taken.shape[0], int) else None

    def check_shapes(self, inputs: tuple[int, ...], embed_dim: int) -> None:
        """Raises BundleError where the graph is not made for inputs (N, *inputs), or for embed_dim.

        Sizes that are symbolic in the graph fit all.
        """
        (taken,) = (node.shape for node in self._session.get_inputs())
        given = self._session.get_outputs()[0].shape
        pairs = [*zip(taken[1:], inputs, strict=False), (given[-1], embed_dim)]
        if len(taken) != len(inputs) + 1 or any(isinstance(a, int) and a != b for a, b in pairs):
            raise BundleError(
                f"{self._path} takes {taken} and gives {given}, which is not what the manifest says"
            )

    @property
    def _session(self) -> ort.InferenceSession:
        return self._opened.get()

    def embed(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        return self._fetch(self._session, "embedding", inputs)

    def tokens(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        return self._fetch(self._whole.get(), "tokens", inputs)

    @cached_property
    def _whole(self) -> Session:
        """Opened only where tokens are asked for."""
        return Session(self._path, self._device, self._threads)

    def _fetch(
        self, session: ort.InferenceSession, output: str, inputs: NDArray[Any]
    ) -> NDArray[np.float32]:
        count = self._batch or max(len(inputs), 1)
        parts = [
            run_session(
                session, (output,), {self._input: inputs[i : i + count]}, self._path, self._device
            )[0]
            for i in range(0, len(inputs), count)
        ]
        if len(parts) == 1:
            return parts[0]
        (shape,) = (node.shape for node in session.get_outputs() if node.name == output)
        return np.concatenate(parts) if parts else np.empty((0, *shape[1:]), np.float32)


def _session_options(ort: Any, threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; what matters is raised
    # Never 0, for which ONNX Runtime takes the machine's cores, and pins threads to them.
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    return options


def first_line(err: Exception) -> str:
    return str(err).partition("\n")[0]
