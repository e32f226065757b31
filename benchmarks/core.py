"""The operations of edgeclip._core on the CPU against their limits and their peers.

A single sample is bound by reading the class matrix: the fastest of NumPy's reductions that touch
every byte, over as many threads as gain something. A batch is bound by the matrix product:
the faster of NumPy's and PyTorch's, with all cores. Purification is compared with none, and
preprocessing with open_clip's transform of the decoded picture. All in this process in turn; a ratio
above its limit is marked, and the exit status is then 1. On a machine with other work they are noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from open_clip.transform import image_transform

from benchmarks.latency import STEP_SIZE, STEPS, picture, versions_of
from benchmarks.timing import machine, medians_ms, publish
from edgeclip import _core
from edgeclip.cli.command import run_command
from edgeclip.host import cores

EPILOG = """examples:
  python -m benchmarks.core
  python -m benchmarks.core --repeats 200 --json core.json
  EDGECLIP_SIMD=avx2 python -m benchmarks.core

exit status: 0 all ratios are within their limits; 1 some are not.
"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZE = 224
BIG = 16e6  # bytes, from which on reading is shared by threads


class Case(NamedTuple):
    name: str
    ours: Callable[[], object]
    references: dict[str, Callable[[], object]]  # of which the fastest counts
    limit: float  # of our time divided by the reference's


def problem(n: int, d: int, k: int) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
    """Embeddings (n, d), unit classes (k, d), and the arguments that purify."""
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((n, d), np.float32)
    classes = rng.standard_normal((k, d), np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    null_text = classes.mean(axis=0)
    null_text /= np.linalg.norm(null_text)
    purify = {"null_text": null_text, "null_scores": classes @ null_text}
    return embeddings, classes, purify | {"steps": STEPS, "step_size": STEP_SIZE}


def reads(array: np.ndarray) -> dict[str, Callable[[], object]]:
    """Reductions that do nothing but read an array, each in one thread and in one per core."""
    threads = cores()
    pool = ThreadPoolExecutor(threads)

    def shared(reduce: Callable, values: np.ndarray) -> object:
        first, *rest = np.array_split(values, threads)
        others = [pool.submit(reduce, part) for part in rest]
        return [reduce(first), *(other.result() for other in others)]

    floats, words = array.reshape(-1), array.reshape(-1).view(np.int64)
    found: dict[str, Callable[[], object]] = {}
    for name, reduce, values in (("max", np.max, floats), ("or", np.bitwise_or.reduce, words)):
        found[f"read: {name}"] = partial(reduce, values)
        if array.nbytes > BIG:
            found[f"read: {name}, {threads} threads"] = partial(shared, reduce, values)
    return found


def classify_case(n: int, d: int, k: int) -> Case:
    embeddings, classes, purify = problem(n, d, k)

    def ours() -> object:
        return _core.classify(embeddings, classes, logit_scale=100.0, **purify)

    name = f"classify {n} x {d} x {k:,}"
    if n == 1:
        return Case(name, ours, reads(classes), 1.5)
    a, b = torch.from_numpy(embeddings), torch.from_numpy(classes)
    products = {
        "sgemm: NumPy": lambda: embeddings @ classes.T,
        "sgemm: PyTorch": lambda: a @ b.T,
    }
    return Case(name, ours, products, 2.0)


def purify_case(n: int, d: int, k: int) -> Case:
    embeddings, classes, purify = problem(n, d, k)
    return Case(
        f"purification in classify {n} x {d} x {k:,}",
        lambda: _core.classify(embeddings, classes, logit_scale=100.0, **purify),
        {"steps=0": lambda: _core.classify(embeddings, classes, logit_scale=100.0)},
        1.01,
    )


def preprocess_case(width: int, height: int, limit: float) -> Case:
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
    for n, d, k in ((1, 512, 1000), (1, 768, 21841), (64, 512, 1000), (64, 768, 21841)):
        yield classify_case(n, d, k)
    for n in (1, 64):
        yield purify_case(n, 768, 21841)
    yield preprocess_case(4000, 3000, 1 / 6)
    yield preprocess_case(640, 480, 1 / 3)


def measure(case: Case, repeats: int) -> dict:
    ms = medians_ms({"edgeclip": case.ours, **case.references}, repeats, rounds=10)
    ours = ms.pop("edgeclip")
    ratio = ours / min(ms.values())
    row = {"operation": case.name, "ms": ours, "references": ms, "ratio": ratio}
    return row | {"limit": case.limit, "within": ratio <= case.limit}


def render(report: dict) -> str:
    """The report as Markdown."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=100, help="runs of each (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
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
