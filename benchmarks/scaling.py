"""Time against the batch, the labels, the image size and the threads, with its limits.

Limits are rates of the same machine in the same run: the encoder's floating-point operations at the rate
of a large float32 matrix product, and the bytes to read (label embeddings; the decoded image) at the rate
of summing a large array. Decoding has no such limit, nor has data that fits a processor's cache. The
weights are random, which does not change the time.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import open_clip
import torch

import edgeclip
from benchmarks.common import (
    MATRIX,
    Report,
    add_model,
    build_parser,
    bundle_for,
    encoder_flops,
    versions_of,
)
from benchmarks.timing import machine, medians_ms, publish
from edgeclip import _core
from edgeclip.cli.command import run_command
from edgeclip.host import cores
from edgeclip.images.decoding import decode
from edgeclip.tools.pictures import picture

EPILOG = """examples:
  python -m benchmarks.scaling
  python -m benchmarks.scaling --threads 1 4 --repeats 20 --json scaling.json
"""
BATCHES = (1, 2, 4, 8, 16)
LABELS = (10, 100, 1000, 21_841)  # the last: ImageNet-21k
SIZES = ((224, 224), (320, 240), (640, 480), (1920, 1080), (4000, 3000))
CACHE = 32 * 2**20  # bytes: smaller data may stay in a processor's cache between runs
ARRAY = 32 * 2**20  # float32 numbers: four times CACHE in bytes


@dataclass(frozen=True)
class Row:
    """Measurement; limit_ms is None without a theoretical limit."""

    what: str
    size: str
    threads: int
    ms: float
    limit_ms: float | None


@dataclass(frozen=True)
class Case:
    """Call, with its number of floating-point operations or bytes to read."""

    what: str
    size: str
    call: Callable[[], object]
    flops: float = 0.0
    bytes: float = 0.0


def measure(cases: Sequence[Case], threads: int, repeats: int) -> Iterator[Row]:
    """Yield the rows of the cases, in turns with the machine's own rates."""
    torch.set_num_threads(threads)
    a, b, many = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX), torch.rand(ARRAY)
    calls = {f"{case.what} {case.size}": case.call for case in cases}
    calls |= {"product": partial(torch.mm, a, b), "read": many.sum}
    ms = medians_ms(calls, repeats, warm_up=1)
    per_flop, per_byte = ms["product"] / (2 * MATRIX**3), ms["read"] / (4 * ARRAY)
    for case in cases:
        from_memory = case.bytes if case.bytes > CACHE else 0
        limit = case.flops * per_flop + from_memory * per_byte
        yield Row(case.what, case.size, threads, ms[f"{case.what} {case.size}"], limit or None)


def encoder_cases(rt: edgeclip.Runtime, flops: int) -> Iterator[Case]:
    """Yield the encoder at each batch."""
    rng = np.random.default_rng(0)
    for count in BATCHES:
        pixels = rng.standard_normal((count, 3, *rt.bundle.manifest.image.size), np.float32)
        yield Case("encoder", f"batch {count}", partial(rt.encode, pixels), flops=flops * count)


def classify_cases(dim: int) -> Iterator[Case]:
    """Yield classification at each number of labels; the core chooses the number of threads."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, dim), np.float32)
    for count in LABELS:
        classes = rng.standard_normal((count, dim), np.float32)
        call = partial(_core.classify, row, classes, logit_scale=100.0, top_k=5)
        yield Case("classify", f"{count} labels", call, bytes=classes.nbytes)


def image_cases(rt: edgeclip.Runtime, jpegs: dict[str, bytes]) -> Iterator[Case]:
    """Yield preprocessing of each JPEG."""
    for size, jpeg in jpegs.items():
        image = decode(jpeg)
        yield Case("preprocess", size, partial(rt.preprocess, [image]), bytes=image.nbytes)


def rows(args: argparse.Namespace, threads: Sequence[int], flops: int) -> Iterator[Row]:
    """Yield all rows."""
    folder = bundle_for(args.model)
    jpegs = {}
    for width, height in SIZES:
        buffer = io.BytesIO()
        picture(width, height).save(buffer, "JPEG", quality=90)
        jpegs[f"{width}x{height}"] = buffer.getvalue()
    for count in threads:
        rt = edgeclip.Runtime(folder, precision=args.precision, purify="none", threads=count)
        cases = [*encoder_cases(rt, flops), *image_cases(rt, jpegs)]
        yield from measure(cases, count, args.repeats)
    decoding = [Case("decode", size, partial(decode, jpeg)) for size, jpeg in jpegs.items()]
    yield from measure(decoding, 1, args.repeats)
    classifying = list(classify_cases(rt.bundle.manifest.embed_dim))
    yield from measure(classifying, cores(), args.repeats)


def render(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"edgeclip {report['precision']}; {report['flops'] / 1e9:.2f} GFLOP per image.",
        "",
        "| what | size | threads | ms | limit ms | of limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        limits = " | "
        if row["limit_ms"] is not None:
            limits = f"{row['limit_ms']:.3f} | {row['limit_ms'] / row['ms']:.0%}"
        lines.append(
            f"| {row['what']} | {row['size']} | {row['threads']} | {row['ms']:.3f} | {limits} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add = parser.add_argument
    add_model(parser)
    add(
        "--precision",
        default="fp32",
        help="precision of the encoder (default: fp32, which the limit is for)",
    )
    add(
        "--threads", type=int, nargs="+", metavar="T", help="threads (default: 1, and one per core)"
    )
    add("--repeats", type=int, default=10, help="runs of each call (default: 10)")
    args = parser.parse_args()
    threads = args.threads or sorted({1, cores()})
    if min(*threads, args.repeats) < 1:
        parser.error("--threads and --repeats must be 1 or more")

    logging.disable(logging.WARNING)  # open_clip warns of random weights
    flops = encoder_flops(open_clip.create_model(args.model))
    measured = [asdict(row) for row in rows(args, threads, flops)]
    report = {
        "machine": machine(),
        "versions": versions_of("edgeclip", "onnxruntime", "torch"),
        "model": args.model,
        "precision": args.precision,
        "flops": flops,
        "repeats": args.repeats,
        "rows": measured,
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
