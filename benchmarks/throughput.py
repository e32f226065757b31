"""Images per second from JPEG files to answers, against its limit, the plain loop and open_clip.

All in one process on all cores, by turns. The weights are random, which does not change the time.

limit: no core is ever idle: the encoder alone, on batches that are ready, and the core time of
decoding and preprocessing spread over the cores. `classify_each` overlaps the two; the plain loop is
`classify`, which does one after the other. The peer is the eager encoder of open_clip behind a
DataLoader with one worker process per core, started beforehand. Memory is that of `edgeclip
classify` with the embedded bundle on a folder of small files: its peak as a process.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import edgeclip
from benchmarks.latency import bundle_for, picture, versions_of
from benchmarks.purification import label_set
from benchmarks.timing import machine, process, publish
from edgeclip.cli.command import run_command
from edgeclip.host import cores

EPILOG = """examples:
  python -m benchmarks.throughput
  python -m benchmarks.throughput --images 256 --rounds 5 --json throughput.json
"""
SIZES = {"320x240": (320, 240), "640x480": (640, 480), "12 megapixels": (4000, 3000)}
COLUMNS = ("edgeclip", "limit", "encoder alone", "preparing alone", "plain loop", "open_clip")
FILES = (100, 5000)  # of the memory measurement
MEMORY_COMMAND = [sys.executable, "-m", "edgeclip", "classify", "--labels", "examples/labels.txt"]


class Files(Dataset):
    """The same file many times, as open_clip's input."""

    def __init__(self, path: Path, count: int, transform: Any) -> None:
        self.path, self.count, self.transform = path, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.path).convert("RGB"))


def peer(model: Any, transform: Any, path: Path, args: Any, classes: torch.Tensor) -> Any:
    """open_clip's answers for the files, by a call."""
    files = Files(path, args.images, transform)
    workers = {"num_workers": cores(), "persistent_workers": True}
    loader = DataLoader(files, batch_size=args.batch_size, **workers)
    next(iter(loader))  # starts the workers

    def classify() -> None:
        with torch.no_grad():
            for pixels in loader:
                rows = F.normalize(model.encode_image(pixels), dim=1)
                (model.logit_scale.exp() * rows @ classes.T).softmax(1).topk(5)

    return classify


def seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and processor time of each call in seconds; they take turns."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.1)  # the threads of the call before spin for a while
            started, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    return {name: (statistics.median(wall[name]), statistics.median(cpu[name])) for name in calls}


def measure(rt: edgeclip.Runtime, model: Any, transform: Any, path: Path, args: Any) -> dict:
    """Images per second of each way for one file."""
    labels = label_set(rt, args.labels)
    files = [path] * args.images
    ready = rt.preprocess(files[: args.batch_size])
    runs = args.images // args.batch_size
    calls: dict[str, Callable[[], object]] = {
        "encoder alone": lambda: [rt.classify_pixels(ready, labels) for _ in range(runs)],
        "preparing alone": lambda: [rt.preprocess([file]) for file in files],
        "edgeclip": lambda: list(rt.classify_each(files, labels)),
        "plain loop": lambda: rt.classify(files, labels),
        "open_clip": peer(model, transform, path, args, torch.tensor(labels.embeddings)),
    }
    found = seconds(calls, args.rounds)
    rates = {name: args.images / wall for name, (wall, _) in found.items()}
    limit = found["encoder alone"][0] + found["preparing alone"][1] / cores()
    rates["limit"] = args.images / limit
    rates["share of limit"] = rates["edgeclip"] / rates["limit"]
    rates["share of encoder"] = rates["edgeclip"] / rates["encoder alone"]
    return rates


def measure_memory(jpeg: Path) -> dict[int, float]:
    """Peak memory in MB of classifying a folder by its number of files."""
    found = {}
    for count in FILES:
        with tempfile.TemporaryDirectory(dir=jpeg.parent) as folder:
            for i in range(count):
                os.link(jpeg, f"{folder}/{i:06}.jpg")
            _, found[count] = process([*MEMORY_COMMAND, folder], 1)
    return found


def render(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f"Images per second, edgeclip {report['precision']}, batch {report['batch_size']}:",
        "",
        f"| JPEG | {' | '.join(COLUMNS)} | of limit | of encoder | open_clip = 1 |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for name, rates in report["images_per_second"].items():
        cells = " | ".join(f"{rates[column]:.1f}" for column in COLUMNS)
        shares = f"{rates['share of limit']:.0%} | {rates['share of encoder']:.0%}"
        ratio = rates["edgeclip"] / rates["open_clip"]
        lines.append(f"| {name} | {cells} | {shares} | {ratio:.1f} |")
    lines += ["", "| files of 320x240 | peak memory, MB |", "|---|---|"]
    lines += [f"| {count} | {megabytes:.0f} |" for count, megabytes in report["peak_mb"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="ViT-B-32", help="of open_clip, with random weights")
    add("--images", type=int, default=64, help="in each run (default: 64)")
    add("--batch-size", type=int, default=8, help="default: 8")
    add("--labels", type=int, default=1000, help="classes (default: 1000)")
    add("--rounds", type=int, default=3, help="runs of each (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if args.batch_size < 1 or args.images < 1 or args.images % args.batch_size:
        parser.error("--images must be a multiple of --batch-size")

    rt = edgeclip.Runtime(
        bundle_for(args.model), precision="int8", purify="none", batch_size=args.batch_size
    )
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random is the point
    model, _, transform = open_clip.create_model_and_transforms(args.model)
    model.eval()
    images = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            path = Path(folder) / f"{size[0]}.jpg"
            picture(*size).save(path, quality=90)
            images[name] = measure(rt, model, transform, path, args)
        memory = measure_memory(Path(folder) / "320.jpg")
    report = {
        "machine": machine(),
        "versions": versions_of("edgeclip", "onnxruntime", "torch", "open_clip_torch"),
        "model": args.model,
        "precision": rt.precision,
        "batch_size": args.batch_size,
        "labels": args.labels,
        "images": args.images,
        "rounds": args.rounds,
        "images_per_second": images,
        "peak_mb": memory,
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
