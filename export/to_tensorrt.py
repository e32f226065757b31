"""Compilation of a bundle's graphs by TensorRT-RTX without a GPU: `python -m export.to_tensorrt`.

TensorRT-RTX parses and compiles graphs on any machine, strongly typed as on a device, and so finds
graphs that TensorRT refuses. It does not check speed or answers.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeclip.backends import tensorrt_module
from edgeclip.backends.engine_cache import BuildOptions
from edgeclip.backends.tensorrt_builder import build_engine
from edgeclip.backends.tensorrt_module import import_tensorrt
from edgeclip.bundle import Bundle
from edgeclip.cli.command import run_command
from edgeclip.cli.options import Parser, positive
from edgeclip.errors import BundleError, EdgeclipError
from edgeclip.onnx_file import locations
from edgeclip.precisions import PRECISIONS, engine_precisions
from edgeclip.storage import write
from export import ExportError

UNREADABLE = (
    "graphs are quantised for ONNX Runtime on CPUs (at run time, or with zero points), and "
    "TensorRT cannot read them"
)
NO_FP32 = "FP32 GEMM is not supported"  # TensorRT-RTX multiplies only fp16 on Turing
CELL = 17  # column width in characters
EPILOG = """examples:
  python -m export.to_tensorrt bundles/vit-b-32                         every graph, every GPU
  python -m export.to_tensorrt bundles/vit-b-32 --precision fp16 --capability 86 89
  python -m export.to_tensorrt bundles/vit-b-32 --capability 120 -o engines

requires pip install 'edgeclip[tensorrt-rtx]', and neither a GPU nor a driver. Capabilities: 75 is
Turing (T4, RTX 20), where TensorRT-RTX multiplies only fp16; 80 and 86 are Ampere (A100; RTX 30),
89 Ada (RTX 40), 120 and 121 Blackwell (RTX 50; GB10). Jetsons are not supported: TensorRT-RTX does
not build for Orin (87) or Thor (110), and JetPack's TensorRT does not run its engines. On a Jetson,
engines are built on the device from the same graphs.

exit status: 0; 1 if a graph failed, with the reason; 2 for wrong usage, with a one-line error
"""


def graph_files(bundle: Bundle, precisions: Sequence[str]) -> dict[str, Path]:
    """Return a bundle's ONNX files in these precisions, by name without .onnx.

    Raises BundleError if a graph or its weights were altered.
    """
    manifest = bundle.manifest
    names = []
    for precision in precisions:
        variant = manifest.precisions[precision]
        names += variant.graphs()
        names += [name for name in manifest.files if name == f"fused.{precision}.onnx"]
    names += [manifest.prior.file] if manifest.prior else []
    return {name.removesuffix(".onnx"): _checked_file(bundle, name) for name in names}


def _checked_file(bundle: Bundle, name: str) -> Path:
    """Return the file, after a check of it and of its weights in other files."""
    path = bundle.file(name)
    for data in sorted(locations(path)):
        if not bundle.has_beside(path, data):
            raise BundleError(f"{path} has weights in {data}, for which the bundle has no sha256")
        bundle.file(data)
    return path


def select_precisions(bundle: Bundle, requested: Sequence[str] | None) -> list[str]:
    """Return the requested precisions, or all that TensorRT reads. Raises ExportError."""
    available = bundle.manifest.precisions
    if requested is None:
        readable = [name for name in available if PRECISIONS[name].tensorrt]
        if not readable:
            names = ", ".join(available)
            raise ExportError(
                f"{bundle.path} has no other precision than {names}: {_unreadable(available)}"
            )
        return readable
    if unreadable := [name for name in requested if not PRECISIONS[name].tensorrt]:
        raise ExportError(f"{_unreadable(unreadable)}: name {' or '.join(engine_precisions())}")
    for name in requested:
        if name not in available:
            raise ExportError(f"{bundle.path} has no {name} graphs; it has {', '.join(available)}")
    return list(dict.fromkeys(requested))


def _unreadable(names: Iterable[str]) -> str:
    """Return the reason why TensorRT cannot read the graphs of these precisions."""
    return f"{', '.join(names)} {UNREADABLE}"


def compile_graphs(
    graphs: Mapping[str, Path],
    trt: Any,
    capabilities: Sequence[tuple[int, int]],
    options: BuildOptions,
    out: Path | None = None,
) -> list[str]:
    """Print a table of graphs and GPUs, and return a line for each failure.

    out: folder for the engines. Raises OSError.
    """
    width = max(map(len, graphs)) + 1
    print("graph".ljust(width) + "".join(f"sm_{a}{b}".rjust(CELL) for a, b in capabilities))
    failed: list[str] = []
    notes: dict[str, None] = {}  # unique, in order
    for name, path in graphs.items():
        print(name.ljust(width), end="", flush=True)
        for major, minor in capabilities:
            started = time.monotonic()
            try:
                with _warnings(notes, name):
                    engine = build_engine(path, trt, options, capability=(major, minor))
            except EdgeclipError as err:
                cell = "fails"
                if NO_FP32 in str(err):
                    cell = "no fp32"
                    notes[f"no fp32: sm_{major}{minor} needs fp16 graphs in TensorRT-RTX"] = None
                else:
                    failed.append(f"{name} for sm_{major}{minor}: {err}")
            else:
                cell = f"{time.monotonic() - started:.1f} s {len(engine) / 1e6:,.0f} MB"
                if out is not None:
                    write(out / f"{name}.sm{major}{minor}.engine", engine)
            print(cell.rjust(CELL), end="", flush=True)
        print()
    for note in notes:
        print(note)
    return failed


@contextmanager
def _warnings(notes: dict[str, None], name: str) -> Iterator[None]:
    """Collect TensorRT's warnings in `notes`; its errors are part of a failure's reason."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.WARNING:
                notes[f"warning: {name}: {record.getMessage()}"] = None

    handler, log = Handler(logging.WARNING), logging.getLogger(tensorrt_module.__name__)
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def _capability(text: str) -> tuple[int, int]:
    digits = text.replace(".", "", 1)
    if not (digits.isdecimal() and 2 <= len(digits) <= 3):
        raise argparse.ArgumentTypeError(f"expected a capability such as 86, got {text!r}")
    return int(digits[:-1]), int(digits[-1])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m export.to_tensorrt",
        description="Compile every graph of a bundle by TensorRT-RTX, without a GPU, to check the "
        "graphs. The engines do not run on a Jetson.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="bundle directory")
    text = "precisions of the graphs (default: all in the bundle that TensorRT reads)"
    add("--precision", nargs="+", choices=PRECISIONS, help=text)
    text = "compute capabilities, such as 86 (default: all that TensorRT-RTX supports)"
    add("--capability", nargs="+", type=_capability, metavar="SM", help=text)
    text = "new folder to write the engines to, as GRAPH.smSM.engine"
    add("-o", "--out", metavar="DIR", type=Path, help=text)
    text = "memory for kernels in MiB (default: 1024)"
    add("--workspace", metavar="MIB", type=positive, default=1024, help=text)
    text = "largest batch (default: 8)"
    add("--max-batch", metavar="N", type=positive, default=8, help=text)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[str]:
    trt = import_tensorrt("tensorrt_rtx")
    supported = tensorrt_module.capabilities(trt)
    capabilities = list(dict.fromkeys(options.capability or supported))
    for capability in capabilities:
        tensorrt_module.check_capability(trt, capability)
    bundle = Bundle(options.bundle)
    precisions = select_precisions(bundle, options.precision)
    if options.out is not None:
        try:
            options.out.mkdir(parents=True)
        except FileExistsError as err:
            raise ExportError(f"{options.out} exists: name another folder") from err
    settings = BuildOptions(
        max_batch=options.max_batch,
        context_length=bundle.manifest.text.context_length,
        workspace_bytes=options.workspace << 20,
    )
    files = graph_files(bundle, precisions)
    failed = compile_graphs(files, trt, capabilities, settings, options.out)
    skipped = [name for name in bundle.manifest.precisions if name not in precisions]
    if options.precision is None and skipped:
        print(f"skipped: {_unreadable(skipped)}")
    print(
        f"compiled by {trt.__name__} {trt.__version__} without a GPU: no engine was run, and none "
        "runs on a Jetson, where engines are built on the device"
    )
    return failed


def _run(arguments: list[str] | None) -> int:
    try:
        failed = run(parse(arguments))
    except KeyboardInterrupt:
        print(flush=True)  # ends the unfinished row of the table
        raise
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
