"""Images per second from JPEG files to answers, against its limit, the plain loop and open_clip.

All in one process on all cores, by turns. The weights are random, which does not change the time.

limit: no core is ever idle: the encoder alone, on batches that are ready, and the core time of
decoding and preprocessing spread over the cores. `classify_each` overlaps the two; the plain loop is
`classify`, which does one after the other. The peer is the eager encoder of open_clip behind a
DataLoader with one worker process per core, started beforehand. Memory is that of `edgeclip
classify` with the bundle `garments` on a folder of small files: its peak as a process.
"""

from __future__ import annotations

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
from benchmarks.common import (
    Report,
    add_model,
    build_parser,
    bundle_for,
    label_set,
    versions_of,
)
from benchmarks.timing import machine, process, publish
from edgeclip.cli.command import run_command
from edgeclip.host import cores
from edgeclip.tools.pictures import picture

EPILOG = """examples:
  python -m benchmarks.throughput
  python -m benchmarks.throughput --images 256 --rounds 5 --json throughput.json
"""
SIZES = {"320x240": (320, 240), "640x480": (640, 480), "12 megapixels": (4000, 3000)}
COLUMNS = ("edgeclip", "limit", "encoder alone", "preparing alone", "plain loop", "open_clip")
FILES = (100, 5000)  # for the measurement of memory
MEMORY_COMMAND = [sys.executable, "-m", "edgeclip", "classify", "--bundle", "garments"]
MEMORY_COMMAND += ["--labels", "examples/labels.txt"]


class RepeatedFile(Dataset[torch.Tensor]):
    """Data set of one file, many times, as open_clip's input."""

    def __init__(self, path: Path, count: int, transform: Any) -> None:
        self.path, self.count, self.transform = path, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels: torch.Tensor = self.transform(Image.open(self.path).convert("RGB"))
        return pixels


def peer(
    model: Any, transform: Any, path: Path, args: Any, classes: torch.Tensor
) -> Callable[[], None]:
    """Return a call that classifies the files by open_clip, read by worker processes."""
    files = RepeatedFile(path, args.images, transform)
    loader = DataLoader(
        files, batch_size=args.batch_size, num_workers=cores(), persistent_workers=True
    )
    next(iter(loader))  # starts the workers

    def classify() -> None:
        with torch.no_grad():
            for pixels in loader:
                rows = F.normalize(model.encode_image(pixels), dim=1)
                (model.logit_scale.exp() * rows @ classes.T).softmax(1).topk(5)

    return classify


def seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Return the median wall and processor time of each call in seconds; calls take turns."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.1)  # threads of the previous call spin for a while
            started, used = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    return {name: (statistics.median(wall[name]), statistics.median(cpu[name])) for name in calls}


def measure(
    rt: edgeclip.Runtime, model: Any, transform: Any, path: Path, args: Any
) -> dict[str, float]:
    """Return the images per second of each call for one file."""
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
    times = seconds(calls, args.rounds)
    rates = {name: args.images / wall for name, (wall, _) in times.items()}
    limit = times["encoder alone"][0] + times["preparing alone"][1] / cores()
    rates["limit"] = args.images / limit
    rates["share_of_limit"] = rates["edgeclip"] / rates["limit"]
    rates["share_of_encoder"] = rates["edgeclip"] / rates["encoder alone"]
    return rates


def measure_memory(jpeg: Path) -> dict[int, float]:
    """Return the peak memory in MB of classifying a folder, by its number of files."""
    peaks = {}
    for count in FILES:
        with tempfile.TemporaryDirectory(dir=jpeg.parent) as folder:
            for i in range(count):
                os.link(jpeg, f"{folder}/{i:06}.jpg")
            _, peaks[count] = process([*MEMORY_COMMAND, folder], 1)
    return peaks


def render(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"Images per second, edgeclip {report['precision']}, batch {report['batch_size']}:",
        "",
        f"| JPEG | {' | '.join(COLUMNS)} | of limit | of encoder | open_clip = 1 |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for name, rates in report["images_per_second"].items():
        cells = " | ".join(f"{rates[column]:.1f}" for column in COLUMNS)
        shares = f"{rates['share_of_limit']:.0%} | {rates['share_of_encoder']:.0%}"
        ratio = rates["edgeclip"] / rates["open_clip"]
        lines.append(f"| {name} | {cells} | {shares} | {ratio:.1f} |")
    lines += ["", "| files of 320x240 | peak memory, MB |", "|---|---|"]
    lines += [f"| {count} | {megabytes:.0f} |" for count, megabytes in report["peak_mb"].items()]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add = parser.add_argument
    add_model(parser)
    add("--images", type=int, default=64, help="images in each run (default: 64)")
    add("--batch-size", type=int, default=8, help="images in one run of the encoder (default: 8)")
    add("--labels", type=int, default=1000, help="number of classes (default: 1000)")
    add("--rounds", type=int, default=3, help="runs of each call (default: 3)")
    args = parser.parse_args()
    if args.batch_size < 1 or args.images < 1 or args.images % args.batch_size:
        parser.error("--images must be a multiple of --batch-size")

    rt = edgeclip.Runtime(
        bundle_for(args.model), precision="int8", purify="none", batch_size=args.batch_size
    )
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip warns of random weights
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
