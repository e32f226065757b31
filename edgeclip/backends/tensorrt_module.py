"""TensorRT's Python module: import, log, and the GPUs that it builds for.

Supported: tensorrt, 10.3 (JetPack 6.1) to 11, and tensorrt_rtx, which also builds for absent GPUs.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from typing import Any

from edgeclip.errors import DeviceError

logger = logging.getLogger(__name__)

MODULES = {"tensorrt": (10, 3), "tensorrt_rtx": (1, 4)}  # module -> oldest version tested
INSTALL = {
    "tensorrt": "pip install 'edgeclip[tensorrt]' on a machine with an NVIDIA GPU; on a Jetson it is "
    "JetPack's own, which a virtual environment sees when made by: "
    "python3 -m venv --system-site-packages",
    "tensorrt_rtx": "pip install 'edgeclip[tensorrt-rtx]'",
}


def import_tensorrt(*names: str) -> Any:
    """Return the first installed module of `names`, by default of MODULES.

    Raises DeviceError, with what to install, if there is none or it does not work.
    """
    names = names or tuple(MODULES)
    for name in names:
        try:
            trt = importlib.import_module(name)
        except ModuleNotFoundError as err:
            if err.name != name:
                raise DeviceError(
                    f"{name} is only partly installed ({err}): {INSTALL[name]}"
                ) from err
            continue
        except (ImportError, OSError, RuntimeError) as err:  # from the loader or the wheels
            raise DeviceError(
                f"{name} is installed, but its libraries do not load ({one_line(err)}): install it "
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


@functools.cache
def trt_logger(trt: Any) -> Any:
    """Return this process's only trt.ILogger, which forwards messages to Python's logging.

    TensorRT keeps the first logger that it sees. `last_error` is the most recent error message.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }  # VERBOSE is dropped: thousands of lines

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, level: Any, text: str) -> None:
            number = levels.get(level)
            if number == logging.ERROR:
                self.last_error = one_line(text)
            if number is not None:
                logger.log(number, "TensorRT: %s", one_line(text))

    return Log()


def capabilities(trt: Any) -> list[tuple[int, int]]:
    """Return the capabilities of absent GPUs that `trt` builds for: none unless it is TensorRT-RTX."""
    names = dir(getattr(trt, "ComputeCapability", None))
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch("SM[0-9]+", name))
    return [divmod(number, 10) for number in numbers]


def check_capability(trt: Any, capability: tuple[int, int]) -> None:
    """Raise DeviceError unless `trt` builds for an absent GPU of this capability."""
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


def one_line(text: object) -> str:
    """Return the text with its line breaks replaced by spaces."""
    return " ".join(str(text).split())


def _version(trt: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", str(trt.__version__))[:2])
