"""Encoding of labels by edgeclip, with and without its cache, against open_clip.

The prompts are open_clip's 80 templates for ImageNet with a sample of ImageNet's classes. The weights
are random, which does not change the time. The peer is open_clip as it is: eager float32, 77 tokens for
each prompt, at its best batch size, on part of the prompts, since its time does not depend on their
length. Both take turns in one process and use all cores. The operations are those of the linear layers,
2 x 12 x width^2 for each token and layer, which shorter prompts save.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import open_clip
import torch

import edgeclip
from benchmarks.common import (
    Report,
    add_model,
    add_repeats,
    build_parser,
    bundle_for,
    versions_of,
)
from benchmarks.timing import machine, medians_ms, publish
from edgeclip.cli.command import run_command
from edgeclip.text.cache import CachedLabel, LabelCache, embedding_identity, label_keys
from edgeclip.text.label_tokens import DIGEST_SIZE, Cut, LabelTokens

EPILOG = """examples:
  python -m benchmarks.text
  python -m benchmarks.text --labels 5 --repeats 4 --json text.json
  python -m benchmarks.text --bundle vit-b-32/ --precision int8
"""
TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
PEER_BATCHES = (16, 32, 64, 128, 256)
CACHED = 1000  # labels that are loaded from the cache

# Prints resident memory in MB: with the image encoder, while labels are encoded, and afterwards.
MEMORY = """
import sys
import edgeclip

def resident():
    with open("/proc/self/status") as file:
        entries = dict(line.split(":", 1) for line in file)
    return [int(entries[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM")]

rt = edgeclip.Runtime(sys.argv[1], precision=sys.argv[2])
before, _ = resident()
rt.labels([f"thing {i}" for i in range(100)], ["a photo of a {}.", "itap of my {}."])
after, peak = resident()
print(before, peak, after)
"""


def measure_encoding(rt: edgeclip.Runtime, names: list[str], args: argparse.Namespace) -> Report:
    """Return the milliseconds for one prompt by each encoder, and the size of the work."""
    prompts = [template.replace("{}", name) for name in names for template in TEMPLATES]
    lengths = (rt.tokenize(prompts) != rt.bundle.manifest.text.pad_id).sum(axis=1)
    model = open_clip.create_model(args.model).eval()
    ids = open_clip.get_tokenizer(args.model)(prompts[: max(PEER_BATCHES)])

    def peer(size: int) -> None:
        with torch.no_grad():
            for chunk in ids[: max(size, 64)].split(size):
                model.encode_text(chunk)

    calls: dict[str, Callable[[], object]] = {
        f"open_clip, batches of {n}": partial(peer, n) for n in PEER_BATCHES
    }
    calls["edgeclip"] = lambda: rt.embed_texts(prompts)
    times = medians_ms(calls, args.repeats, rounds=args.repeats, warm_up=0)
    for n in PEER_BATCHES:
        times[f"open_clip, batches of {n}"] /= min(max(n, 64), len(ids))
    times["edgeclip"] /= len(prompts)
    width = model.transformer.width
    work = 2 * 12 * width**2 * model.transformer.layers / 1e9
    return {
        "ms": times,
        "prompts": len(prompts),
        "tokens": float(lengths.mean()),
        "gflop": {"edgeclip": work * float(lengths.mean()), "open_clip": work * ids.shape[1]},
    }


def measure_cache(rt: edgeclip.Runtime, repeats: int) -> float:
    """Return the milliseconds of Runtime.labels for 1,000 cached labels with 80 templates."""
    names = [f"{name} {i}" for i, name in enumerate(open_clip.IMAGENET_CLASSNAMES[:CACHED])]
    rows = np.random.default_rng(0).standard_normal((CACHED, rt.bundle.manifest.embed_dim))
    encoder = embedding_identity(rt.text_identity(), rt.onnx_device)
    keys = label_keys(encoder, [edgeclip.Label(name) for name in names], TEMPLATES)
    tokens = [LabelTokens(key[:DIGEST_SIZE], Cut.NOTHING) for key in keys]
    labels = map(CachedLabel, rows.astype(np.float32), tokens)
    LabelCache().store("benchmark", dict(zip(keys, labels, strict=True)))
    # Another order each time, since a Runtime keeps recent label sets in memory.
    orders = iter([names[i:] + names[:i] for i in range(repeats)])
    return medians_ms({"": lambda: rt.labels(next(orders), TEMPLATES)}, repeats, 1, 0)[""]


def measure_memory(rt: edgeclip.Runtime) -> dict[str, float]:
    """Return the resident memory in MB around the encoding of labels."""
    command = [sys.executable, "-c", MEMORY, str(rt.bundle.path), rt.precision]
    environment = os.environ | {"EDGECLIP_CACHE_SIZE": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return dict(zip(("before", "peak", "after"), map(float, done.stdout.split()), strict=True))


def render(report: Report) -> str:
    """Return the report as Markdown."""
    best = min(ms for name, ms in report["ms"].items() if name != "edgeclip")
    lines = [
        (
            f"{report['labels']} labels x {len(TEMPLATES)} templates, {report['tokens']:.1f} tokens in "
            f"the mean; edgeclip {report['precision']}."
        ),
        "",
        "| text encoder | ms a prompt | so 1,000 labels x 80 | speed, best peer = 1 |",
        "|---|---|---|---|",
    ]
    for name, ms in report["ms"].items():
        lines.append(f"| {name} | {ms:.2f} | {80 * ms / 60:.1f} min | {best / ms:.2f} |")
    work = report["gflop"]
    memory = ", ".join(f"{value:.0f} MB {name}" for name, value in report["memory_mb"].items())
    lines += [
        "",
        (
            f"GFLOP a prompt: {work['open_clip']:.2f} in open_clip, {work['edgeclip']:.2f} here, "
            f"{work['open_clip'] / work['edgeclip']:.1f} times less."
        ),
        f"{CACHED:,} cached labels x {len(TEMPLATES)} templates: {report['cached_ms']:.1f} ms.",
        f"Resident memory around the encoding of labels: {memory}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_model(parser)
    parser.add_argument(
        "--bundle", metavar="DIR", help="bundle of that model (default: one with random weights)"
    )
    parser.add_argument(
        "--precision", default="int8", help="precision of the text encoder (default: int8)"
    )
    parser.add_argument(
        "--labels", type=int, default=20, help="number of classes to encode (default: 20)"
    )
    add_repeats(parser, 3)
    args = parser.parse_args()

    logging.disable(logging.WARNING)  # open_clip warns of random weights
    torch.manual_seed(0)
    bundle = args.bundle or bundle_for(args.model)
    sample = np.random.default_rng(0).choice(1000, args.labels, replace=False)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EDGECLIP_CACHE"] = cache
        rt = edgeclip.Runtime(bundle, precision=args.precision)
        cached = measure_cache(rt, 20)
        memory = measure_memory(rt)
        report = measure_encoding(rt, [open_clip.IMAGENET_CLASSNAMES[i] for i in sample], args)

    report |= {
        "machine": machine(),
        "versions": versions_of("edgeclip", "onnxruntime", "torch", "open_clip_torch"),
        "model": args.model,
        "precision": rt.precision,
        "labels": args.labels,
        "repeats": args.repeats,
        "cached_ms": cached,
        "memory_mb": memory,
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
