"""What a bundle is, and whether this installation can run it: for people, and as JSON."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

from edgeclip import __version__, _core, golden
from edgeclip.bundle import Bundle, TokenSpec
from edgeclip.encoders import available_devices
from edgeclip.errors import EdgeclipError
from edgeclip.runtime import Runtime

PACKAGES = ("numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "tensorrt")


def describe(bundle: Bundle) -> dict[str, Any]:
    """A bundle in a few entries, each a value or a list of lines."""
    manifest = bundle.manifest
    height, width = manifest.image.size
    cos = manifest.purification
    return {
        "bundle": str(bundle.path),
        "description": manifest.description,
        "source": [f"{key}: {value}" for key, value in manifest.source.items()],
        "input": f"{height} x {width}, resize {manifest.image.resize}, "
        f"{manifest.image.interpolation}",
        "embedding": manifest.embed_dim,
        "tokens": _describe_tokens(manifest.tokens),
        "context length": manifest.text.context_length,
        "templates": list(manifest.templates),
        "precisions": [
            f"{name}: {key} {value:.3g}"
            for name, variant in manifest.precisions.items()
            for key, value in variant.parity.items()
        ],
        "purification": "none" if cos is None else asdict(cos),
        "robustness": [dict(row) for row in manifest.robustness] or "not measured",
        "size": f"{sum((bundle.path / f).stat().st_size for f in manifest.files) / 1e6:.1f} MB",
    }


def examine(path: str | PathLike[str] | None, device: str) -> dict[str, Any]:
    """This installation, its devices, and a bundle against its golden outputs.

    The entry "problem" is empty where all is well; otherwise it says what is wrong.
    """
    report: dict[str, Any] = {
        "edgeclip": f"{__version__}, core {_core.simd()}, "
        f"CUDA {'built in' if _core.cuda_built() else 'not built in'}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": [f"{name} {_installed(name)}" for name in PACKAGES],
        "devices": [],
        "bundle": str(path or "embedded demonstration"),
        "device used": "",
        "golden": [],
        "problem": "",
    }
    try:
        report["devices"] = available_devices()
        runtime = Runtime(path, device=device, purify="none")
        report["bundle"] = f"{runtime.bundle.path}: {runtime.bundle.manifest.description}"
        runtime.bundle.verify()
        report["device used"] = f"{runtime.device}, {runtime.precision}"
        report["golden"] = [
            f"{name}: largest difference {difference:.2g}"
            for name, difference in golden.check(runtime).items()
        ]
    except EdgeclipError as err:
        report["problem"] = str(err)
    return report


def _describe_tokens(tokens: TokenSpec | None) -> str:
    if tokens is None:
        return ""
    rows, columns = tokens.grid
    return f"{rows} x {columns} patches, after {tokens.prefix} others"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
