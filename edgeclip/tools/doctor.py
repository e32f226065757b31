"""Reports on a bundle, and on whether this installation runs it."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from typing import Any

from edgeclip import __version__, _core, host
from edgeclip.backends.select import ORDER, engine_precisions, why_not
from edgeclip.bundle import DEFAULT, Bundle
from edgeclip.errors import EdgeclipError
from edgeclip.manifest import PriorSpec, Robustness, TokenSpec, Variant
from edgeclip.runtime import Runtime
from edgeclip.tools import golden

PACKAGES = (
    "numpy",
    "pillow",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)


def describe(bundle: Bundle) -> dict[str, Any]:
    """Return the properties of a bundle; each entry is a value or a list of lines."""
    manifest = bundle.manifest
    height, width = manifest.image.size
    return {
        "bundle": str(bundle.path),
        "description": manifest.description,
        "source": [f"{key}: {value}" for key, value in manifest.source.items()],
        "input": f"{height} x {width}, resize {manifest.image.resize}, "
        f"{manifest.image.interpolation}",
        "embedding": manifest.embed_dim,
        "tokens": _describe_tokens(manifest.tokens),
        "context_length": manifest.text.context_length,
        "templates": list(manifest.templates),
        "precisions": [
            line for name, v in manifest.precisions.items() for line in _describe_variant(name, v)
        ],
        "purification": str(manifest.purification or "none"),
        "prior": _describe_prior(manifest.prior),
        "robustness": [_describe_robustness(row) for row in manifest.robustness] or "not measured",
        "size": f"{sum(bundle.locate(f).stat().st_size for f in manifest.files) / 1e6:.1f} MB",
        "text_from": manifest.text_from or "",
    }


def _describe_variant(name: str, variant: Variant) -> list[str]:
    """Return the speed on the exporter's CPU and the differences from the original model."""
    speed = (
        [] if variant.cpu_ms is None else [f"{name}: {variant.cpu_ms:.3g} ms on the exporter's CPU"]
    )
    return [*speed, *(f"{name}: {key} {value:.6g}" for key, value in variant.parity.items())]


def examine(path: str | PathLike[str] | None, device: str) -> dict[str, Any]:
    """Check the installation, and a bundle against its golden outputs on each device or on `device`.

    The entry "problem" has the error of the device and precision that a Runtime would use, or "".
    """
    report: dict[str, Any] = {
        "edgeclip": f"{__version__}, core {_core.simd()}, "
        f"CUDA {'built in' if _core.cuda_built() else 'not built in'}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "processor": ", ".join(filter(None, (host.cpu_name(), host.vector_units()))),
        "threads": host.cores(),
        "packages": [f"{name} {installed(name)}" for name in PACKAGES],
        "gpu": "",
        "bundle": str(path or DEFAULT),
        "devices": [],
        "device_used": "",
        "precision_used": "",
        "problem": "",
    }
    try:
        bundle = Bundle(path)
        report["bundle"] = f"{bundle.path}: {bundle.manifest.description}"
        bundle.verify()
    except EdgeclipError as err:
        return report | {"problem": str(err)}
    report["gpu"] = _gpu()
    problems = {}
    for name in ORDER if device == "auto" else (device,):
        if reason := why_not(bundle, name):
            report["devices"].append(f"{name}: not used: {reason}")
            continue
        built = engine_precisions(bundle) if name == "tensorrt" else None
        for precision in built or bundle.manifest.precisions:
            try:
                result = _check(bundle, name, precision)
            except EdgeclipError as err:
                result = problems[name, precision] = str(err)
            report["devices"].append(f"{name} {precision}: {result}")
    return report | _used(bundle, device, problems)


def _check(bundle: Bundle, device: str, precision: str) -> str:
    """Return the differences of one precision from the golden outputs. Raises EdgeclipError."""
    with _no_warnings():  # the golden check raises what the warning says
        runtime = Runtime(bundle, device=device, precision=precision, purify="none")
    differences = golden.check(runtime)
    text = ", ".join(f"{key} {value:.2g}" for key, value in differences.items())
    part = "" if device == "cpu" or runtime.gpu else " for the encoder; all else runs on the CPU"
    return f"works{part}; largest golden differences: {text}"


def _used(bundle: Bundle, device: str, problems: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Return the device and precision that a Runtime chooses, and their problem."""
    try:
        with _no_warnings():
            runtime = Runtime(bundle, device=device, purify="none")
    except EdgeclipError as err:
        return {"problem": str(err)}
    problem = problems.get((runtime.device, runtime.precision), "")
    return {
        "device_used": runtime.device,
        "precision_used": runtime.precision,
        "problem": problem,
    }


@contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _gpu() -> str:
    if not _core.cuda_built():
        return ""
    try:
        gpu = _core.cuda_device()
    except RuntimeError as err:
        return str(err)
    major, minor = gpu["capability"]
    version = f"{gpu['driver'] // 1000}.{gpu['driver'] % 1000 // 10}"
    memory = f"{gpu['free_memory'] / 2**30:.1f} of {gpu['memory'] / 2**30:.1f} GiB free"
    return f"{gpu['name']}, compute capability {major}.{minor}, {memory}, driver for CUDA {version}"


def _describe_robustness(row: Robustness) -> str:
    return (
        f"{row.data}, {row.samples} images: {row.clean_accuracy:.1%} clean, "
        f"{row.worst_case_accuracy:.1%} under {' and '.join(row.attacks)} with {row.norm} eps "
        f"{row.eps * 255:g}/255, {row.steps} steps, purification {row.purification}"
    )


def _describe_tokens(tokens: TokenSpec | None) -> str:
    if tokens is None:
        return ""
    rows, columns = tokens.grid
    plural = "" if tokens.prefix == 1 else "s"
    return f"{rows} x {columns} patches after {tokens.prefix} other token{plural}"


def _describe_prior(prior: PriorSpec | None) -> str | list[str]:
    if prior is None:
        return "none: --purify diff is not available"
    summary = f"{prior.file}, {prior.gradient} gradient, {prior.timesteps} timesteps"
    return [summary, *(f"{key} {value:.3g}" for key, value in prior.parity.items())]


def installed(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
