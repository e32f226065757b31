"""Compile a bundle's graphs with TensorRT for GPUs that are not here: `python -m export.to_tensorrt`.

TensorRT-RTX parses and compiles on any machine, strongly typed as on a device: what it refuses is a
fault of the graph that nobody has to carry to a GPU to find. It says nothing of speed or answers.
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
    "graphs are quantised for ONNX Runtime on CPUs (at run time, or with zero points), which "
    "TensorRT does not read"
)
NO_FP32 = "FP32 GEMM is not supported"  # TensorRT-RTX of Turing, which multiplies fp16 only
CELL = 17  # characters of a column
EPILOG = """examples:
  python -m export.to_tensorrt bundles/vit-b-32                    every graph, every GPU
  python -m export.to_tensorrt bundles/vit-b-32 --precision fp16 --capability 86 89
  python -m export.to_tensorrt bundles/vit-b-32 --capability 120 -o engines

It needs pip install 'edgeclip[tensorrt-rtx]', and neither GPU nor driver. Capabilities: 75 is Turing
(T4, RTX 20), for which TensorRT-RTX multiplies fp16 only; 80 and 86 Ampere (A100; RTX 30), 89 Ada (RTX
40), 120 and 121 Blackwell (RTX 50; GB10). A Jetson is none of these: TensorRT-RTX does not build for
Orin (87) or Thor (110), nor do its engines run in the TensorRT of JetPack. There, engines are built on
the device, of the same graphs.

Exit status: 0, or 1 where a graph failed, with the reason, or 2 after one line for wrong usage.
"""


def graphs(bundle: Bundle, precisions: Sequence[str]) -> dict[str, Path]:
    """Every ONNX file of a bundle in these precisions, by its name without .onnx.

    Their weights are known to be intact. Raises BundleError.
    """
    manifest = bundle.manifest
    names = []
    for precision in precisions:
        variant = manifest.precisions[precision]
        names += variant.graphs()
        names += [name for name in manifest.files if name == f"fused.{precision}.onnx"]
    names += [manifest.prior.file] if manifest.prior else []
    return {name.removesuffix(".onnx"): _intact(bundle, name) for name in names}


def _intact(bundle: Bundle, name: str) -> Path:
    """The file, its weights checked: a fused graph has them in the encoder's file."""
    path = bundle.file(name)
    for data in sorted(locations(path)):
        if data not in bundle.manifest.files:
            raise BundleError(f"{path} has weights in {data}, of which the bundle has no sha256")
        bundle.file(data)
    return path


def _why_not(names: Iterable[str]) -> str:
    return f"{', '.join(names)} {UNREADABLE}"


def precisions_of(bundle: Bundle, asked: Sequence[str] | None) -> list[str]:
    """Those that TensorRT reads, or those asked for. Raises ExportError."""
    there = bundle.manifest.precisions
    if asked is None:
        readable = [name for name in there if PRECISIONS[name].tensorrt]
        if not readable:
            names = ", ".join(there)
            raise ExportError(
                f"{bundle.path} has no other precision than {names}: {_why_not(there)}"
            )
        return readable
    if unreadable := [name for name in asked if not PRECISIONS[name].tensorrt]:
        raise ExportError(f"{_why_not(unreadable)}: name {' or '.join(engine_precisions())}")
    for name in asked:
        if name not in there:
            raise ExportError(f"{bundle.path} has no {name}, but {', '.join(there)}")
    return list(dict.fromkeys(asked))


def compile_graphs(
    found: Mapping[str, Path],
    trt: Any,
    capabilities: Sequence[tuple[int, int]],
    options: BuildOptions,
    out: Path | None = None,
) -> list[str]:
    """Print a table of graphs, by their names, and GPUs; return what failed, a line for each.

    out: folder to keep the engines in. Raises OSError.
    """
    wide = max(map(len, found)) + 1
    print("graph".ljust(wide) + "".join(f"sm_{a}{b}".rjust(CELL) for a, b in capabilities))
    failed: list[str] = []
    notes: dict[str, None] = {}  # in their order, each once
    for name, path in found.items():
        print(name.ljust(wide), end="", flush=True)
        for major, minor in capabilities:
            started = time.monotonic()
            try:
                with _warnings(notes, name):
                    made = build_engine(path, trt, options, capability=(major, minor))
            except EdgeclipError as err:
                cell = "fails"
                if NO_FP32 in str(err):
                    cell = "no fp32"
                    notes[f"no fp32: sm_{major}{minor} needs fp16 graphs in TensorRT-RTX"] = None
                else:
                    failed.append(f"{name} for sm_{major}{minor}: {err}")
            else:
                cell = f"{time.monotonic() - started:.1f} s {len(made) / 1e6:,.0f} MB"
                if out is not None:
                    write(out / f"{name}.sm{major}{minor}.engine", made)
            print(cell.rjust(CELL), end="", flush=True)
        print()
    for note in notes:
        print(note)
    return failed


@contextmanager
def _warnings(notes: dict[str, None], name: str) -> Iterator[None]:
    """Keep TensorRT's warnings for after the table; its errors are in the reason of a failure."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.WARNING:
                notes[f"warning: {name}: {record.getMessage()}"] = None

    handler, log = Handler(logging.WARNING), logging.getLogger(tensorrt_module.__name__)
    kept, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = kept


def _capability(text: str) -> tuple[int, int]:
    digits = text.replace(".", "", 1)
    if not (digits.isdecimal() and 2 <= len(digits) <= 3):
        raise argparse.ArgumentTypeError(f"expected one such as 86, got {text!r}")
    return int(digits[:-1]), int(digits[-1])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m export.to_tensorrt",
        description="Compile every graph of a bundle with TensorRT-RTX for GPUs that are not here, as a "
        "check of the graphs. The engines are not for a Jetson.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, help="a directory that python -m export made")
    text = "of the graphs (default: all of the bundle's that TensorRT reads)"
    add("--precision", nargs="+", choices=PRECISIONS, help=text)
    text = "compute capabilities, such as 86 (default: all that TensorRT-RTX builds for)"
    add("--capability", nargs="+", type=_capability, metavar="SM", help=text)
    text = "keep the engines in this new folder, GRAPH.smSM.engine"
    add("-o", "--out", metavar="DIR", type=Path, help=text)
    text = "memory that kernels may use (default: 1024)"
    add("--workspace", metavar="MIB", type=positive, default=1024, help=text)
    text = "images in a batch, at most (default: 8)"
    add("--max-batch", metavar="N", type=positive, default=8, help=text)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[str]:
    trt = import_tensorrt("tensorrt_rtx")
    there = tensorrt_module.capabilities(trt)
    asked = list(dict.fromkeys(options.capability or there))
    for capability in asked:
        tensorrt_module.check_capability(trt, capability)
    bundle = Bundle(options.bundle)
    precisions = precisions_of(bundle, options.precision)
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
    failed = compile_graphs(graphs(bundle, precisions), trt, asked, settings, options.out)
    omitted = [name for name in bundle.manifest.precisions if name not in precisions]
    if options.precision is None and omitted:
        print(f"left out: {_why_not(omitted)}")
    print(
        f"compiled by {trt.__name__} {trt.__version__} without a GPU: nothing was run, and none of it "
        "is for a Jetson, where engines are built on the device"
    )
    return failed


def _run(arguments: list[str] | None) -> int:
    try:
        failed = run(parse(arguments))
    except KeyboardInterrupt:
        print(flush=True)  # ends the row of the table
        raise
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(_run, arguments)


if __name__ == "__main__":
    sys.exit(main())
