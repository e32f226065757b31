"""Operations of edgeclip._core on the CPU against their limits and peers.

One sample is bound by reading the class matrix: the reference is the fastest NumPy reduction that reads
every byte, on one thread or on all. A batch is bound by the matrix product: the reference is the faster
of NumPy's and PyTorch's. Purification is compared with no purification, preprocessing with open_clip's
transform of the decoded picture. All calls take turns in one process. A ratio above its limit is marked,
and the exit status is 1. On a busy machine the ratios are noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.transform import image_transform

from benchmarks.common import (
    Purification,
    Report,
    add_repeats,
    build_parser,
    published_purification,
    versions_of,
)
from benchmarks.timing import machine, medians_ms, publish
from edgeclip import _core
from edgeclip.cli.command import run_command
from edgeclip.host import cores
from edgeclip.tools.pictures import picture

EPILOG = """examples:
  python -m benchmarks.core
  python -m benchmarks.core --repeats 200 --json core.json
  EDGECLIP_SIMD=avx2 python -m benchmarks.core

exit status: 0 all ratios are within their limits; 1 some are not.
"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE = 224
BIG = 16e6  # bytes above which threads share the reading


class Case(NamedTuple):
    """Operation, its references, and the limit of its time relative to the fastest reference."""

    name: str
    ours: Callable[[], object]
    references: dict[str, Callable[[], object]]
    limit: float


def problem(
    n: int, d: int, k: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], Purification]:
    """Return embeddings (n, d), unit classes (k, d), and the arguments that purify."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((n, d), np.float32)
    classes = rng.standard_normal((k, d), np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    null_text = classes.mean(axis=0)
    null_text /= np.linalg.norm(null_text)
    return embeddings, classes, published_purification(null_text, classes @ null_text)


def reads(array: NDArray[np.float32]) -> dict[str, Callable[[], object]]:
    """Return reductions that read an array, each on one thread and on one per core."""
    threads = cores()
    pool = ThreadPoolExecutor(threads)

    def shared(reduce: Callable[[Any], object], values: NDArray[Any]) -> object:
        first, *rest = np.array_split(values, threads)
        others = [pool.submit(reduce, part) for part in rest]
        return [reduce(first), *(other.result() for other in others)]

    floats, words = array.reshape(-1), array.reshape(-1).view(np.int64)
    reductions: tuple[tuple[str, Callable[[Any], object], NDArray[Any]], ...] = (
        ("max", np.max, floats),
        ("or", np.bitwise_or.reduce, words),
    )
    calls: dict[str, Callable[[], object]] = {}
    for name, reduce, values in reductions:
        calls[f"read: {name}"] = partial(reduce, values)
        if array.nbytes > BIG:
            calls[f"read: {name}, {threads} threads"] = partial(shared, reduce, values)
    return calls


def classify_case(n: int, d: int, k: int) -> Case:
    """Return classification of n embeddings against k classes, with purification."""
    embeddings, classes, purification = problem(n, d, k)

    def ours() -> object:
        return _core.classify(embeddings, classes, logit_scale=100.0, **purification)

    name = f"classify {n} x {d} x {k:,}"
    if n == 1:
        return Case(name, ours, reads(classes), 1.5)
    a, b = torch.from_numpy(embeddings), torch.from_numpy(classes)
    products: dict[str, Callable[[], object]] = {
        "sgemm: NumPy": lambda: embeddings @ classes.T,
        "sgemm: PyTorch": lambda: a @ b.T,
    }
    return Case(name, ours, products, 2.0)


def purify_case(n: int, d: int, k: int) -> Case:
    """Return classification with purification, against classification without."""
    embeddings, classes, purification = problem(n, d, k)
    return Case(
        f"purification in classify {n} x {d} x {k:,}",
        lambda: _core.classify(embeddings, classes, logit_scale=100.0, **purification),
        {"steps=0": lambda: _core.classify(embeddings, classes, logit_scale=100.0)},
        1.01,
    )


def preprocess_case(width: int, height: int, limit: float) -> Case:
    """Return preprocessing of one image, against open_clip's transform."""
    image = picture(width, height)
    pixels = np.asarray(image)
    out = np.empty((3, SIZE, SIZE), np.float32)
    transform = image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    return Case(
        f"preprocess {width} x {height}",
        lambda: _core.preprocess(pixels, out, mean=MEAN, std=STD),
        {"open_clip": lambda: transform(image)},
        limit,
    )


def cases() -> Iterator[Case]:
    """Yield the operations at the sizes that are reported."""
    for n, d, k in ((1, 512, 1000), (1, 768, 21841), (64, 512, 1000), (64, 768, 21841)):
        yield classify_case(n, d, k)
    for n in (1, 64):
        yield purify_case(n, 768, 21841)
    yield preprocess_case(4000, 3000, 1 / 6)
    yield preprocess_case(640, 480, 1 / 3)


def measure(case: Case, repeats: int) -> Report:
    """Return the row of an operation."""
    ms = medians_ms({"edgeclip": case.ours, **case.references}, repeats, rounds=10)
    ours = ms.pop("edgeclip")
    ratio = ours / min(ms.values())
    row = {"operation": case.name, "ms": ours, "references": ms, "ratio": ratio}
    return row | {"limit": case.limit, "within": ratio <= case.limit}


def render(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"Instruction set {report['simd']}.",
        "",
        "| operation | ms | reference | ms | ratio | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        reference, ms = min(row["references"].items(), key=lambda pair: pair[1])
        lines.append(
            f"| {row['operation']} | {row['ms']:.3f} | {reference} | {ms:.3f} | {row['ratio']:.3f} "
            f"| {row['limit']:.3f} | {'' if row['within'] else 'missed'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_repeats(parser, 100)
    args = parser.parse_args()

    rows = [measure(case, args.repeats) for case in cases()]
    report = {
        "machine": machine(),
        "versions": versions_of("edgeclip", "numpy", "torch", "open_clip_torch"),
        "simd": _core.simd(),
        "repeats": args.repeats,
        "rows": rows,
    }
    publish(report, render, args.json)
    sys.exit(0 if all(row["within"] for row in rows) else 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
