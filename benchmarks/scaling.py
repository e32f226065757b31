"""How time grows with the batch, the labels, the size of the image and the threads, and its limits.

Limits are what this machine did in the same run: the encoder's floating-point operations at the rate
of a large float32 matrix product, and the bytes that must be read (the labels' embeddings; the
decoded image) at the rate of summing a large array. A matrix that stays in a cache may be read faster
than that. Decoding has no such limit. The weights are random, which does not change the time.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

import edgeclip
from benchmarks.latency import picture
from benchmarks.throughput import kept_bundle
from benchmarks.timing import machine, medians_ms
from edgeclip import _core
from edgeclip.images import decode
from edgeclip.pipeline import cores

EPILOG = """examples:
  python -m benchmarks.scaling
  python -m benchmarks.scaling --threads 1 4 --repeats 20 --json scaling.json
"""
BATCHES = (1, 2, 4, 8, 16)
LABELS = (10, 100, 1000, 21_841)  # the last are ImageNet-21k's
SIZES = ((224, 224), (320, 240), (640, 480), (1920, 1080), (4000, 3000))
MATRIX = 2048  # rows of the matrix product that the rate is taken from
ARRAY = 32 * 2**20  # float32 numbers: more than a cache holds


@dataclass(frozen=True)
class Row:
    """One measurement; a limit is None where there is no theoretical one."""

    what: str
    size: str
    threads: int
    ms: float
    limit_ms: float | None


@dataclass(frozen=True)
class Rates:
    """What the machine does at best with so many threads."""

    flops: float  # per second
    bytes: float  # per second


def timed(call: Callable[[], object], repeats: int) -> float:
    return medians_ms({"": call}, repeats, rounds=1)[""]


def machine_rates(threads: int, repeats: int) -> Rates:
    torch.set_num_threads(threads)
    a, b, many = torch.rand(MATRIX, MATRIX), torch.rand(MATRIX, MATRIX), torch.rand(ARRAY)
    product = 1e-3 * timed(lambda: a @ b, repeats)
    read = 1e-3 * timed(many.sum, repeats)
    return Rates(2 * MATRIX**3 / product, 4 * ARRAY / read)


def encoder_flops(model: str) -> int:
    """Floating-point operations of the image encoder for one image, two per multiply-add."""
    with torch.device("meta"):
        clip = open_clip.create_model(model).eval()
        size = clip.visual.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            clip.encode_image(torch.empty(1, 3, height, width))
    return counter.get_total_flops()


def encoder_rows(
    rt: edgeclip.Runtime, flops: int, rates: Rates, threads: int, repeats: int
) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    for count in BATCHES:
        pixels = rng.standard_normal((count, 3, *rt.bundle.manifest.image.size), np.float32)
        ms = timed(partial(rt.encode, pixels), repeats)
        yield Row("encoder", f"batch {count}", threads, ms, 1e3 * flops * count / rates.flops)


def classify_rows(dim: int, repeats: int) -> Iterator[Row]:
    """On as many threads as it takes by itself, up to one per core."""
    rates = machine_rates(cores(), repeats)
    rng = np.random.default_rng(0)
    row = rng.standard_normal((1, dim), np.float32)
    for count in LABELS:
        classes = rng.standard_normal((count, dim), np.float32)
        ms = timed(partial(_core.classify, row, classes, logit_scale=100.0, top_k=5), repeats)
        yield Row("classify", f"{count} labels", cores(), ms, 1e3 * classes.nbytes / rates.bytes)


def image_rows(rt: edgeclip.Runtime, rates: Rates, threads: int, repeats: int) -> Iterator[Row]:
    for width, height in SIZES:
        buffer = io.BytesIO()
        picture(width, height).save(buffer, "JPEG", quality=90)
        jpeg = buffer.getvalue()
        image, size = decode(jpeg), f"{width}x{height}"
        if threads == 1:  # it has no more
            yield Row("decode", size, 1, timed(partial(decode, jpeg), repeats), None)
        ms = timed(partial(rt.preprocess, [image]), repeats)
        yield Row("preprocess", size, threads, ms, 1e3 * image.nbytes / rates.bytes)


def measure(folder: Path, flops: int, threads: Sequence[int], repeats: int) -> Iterator[Row]:
    for count in threads:
        rates = machine_rates(count, repeats)
        rt = edgeclip.Runtime(folder, purify="none", threads=count)
        yield from encoder_rows(rt, flops, rates, count, repeats)
        yield from image_rows(rt, rates, count, repeats)
    yield from classify_rows(rt.bundle.manifest.embed_dim, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="ViT-B-32", help="of open_clip, with random weights")
    add("--threads", type=int, nargs="+", metavar="T", help="default: 1 and one per core")
    add("--repeats", type=int, default=10, help="runs of each (default: 10)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    threads = args.threads or sorted({1, cores()})
    if min(*threads, args.repeats) < 1:
        parser.error("--threads and --repeats must be 1 or more")

    flops = encoder_flops(args.model)
    versions = {p: version(p) for p in ("edgeclip", "onnxruntime", "torch")}
    print(f"{args.model}, {flops / 1e9:.2f} GFLOP per image; {machine()}")
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    print("\n| what | size | threads | ms | limit ms | of limit |\n|---|---|---|---|---|---|")
    rows = []
    for row in measure(kept_bundle(args.model), flops, threads, args.repeats):
        rows.append(row)
        limits = " | "
        if row.limit_ms is not None:
            limits = f"{row.limit_ms:.3f} | {row.limit_ms / row.ms:.0%}"
        print(f"| {row.what} | {row.size} | {row.threads} | {row.ms:.3f} | {limits} |", flush=True)
    if args.json:
        report = {"machine": machine(), "versions": versions, "model": args.model}
        report |= {"flops": flops, "repeats": args.repeats, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
