"""edgeclip: adversarially robust zero-shot image classification with CLIP, without PyTorch."""

import os

# ONNX Runtime reads the variable on import, and edgeclip imports it later than this.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    from edgeclip._core import __version__
except ImportError as err:
    if err.name != "edgeclip._core":
        raise
    raise ImportError(
        "edgeclip's compiled core is missing: in a checkout, run `make build` "
        "(or `pip install -e .`) and use that environment's Python"
    ) from err

from edgeclip.bundle import Bundle
from edgeclip.errors import BundleError, DeviceError, EdgeclipError, ImageError, LabelError
from edgeclip.labels import Label, LabelSet, read_labels
from edgeclip.prediction import FrameAnswer, Prediction
from edgeclip.purify import CosPurifier, DiffPurifier
from edgeclip.runtime import Runtime

__all__ = [
    "Bundle",
    "BundleError",
    "CosPurifier",
    "DeviceError",
    "DiffPurifier",
    "EdgeclipError",
    "FrameAnswer",
    "ImageError",
    "Label",
    "LabelError",
    "LabelSet",
    "Prediction",
    "Runtime",
    "__version__",
    "read_labels",
]
