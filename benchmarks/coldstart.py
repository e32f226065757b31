"""From the command to its answer: `edgeclip classify` as a whole process, labels cached, against
`import open_clip`, which is where an answer by open_clip begins.

The weights of the larger model are random, which does not change the time. The files are in the
system's cache, as they are after a first run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import edgeclip
from benchmarks.latency import bundle_for, picture, versions_of
from benchmarks.timing import machine, process, publish
from edgeclip.cli.command import run_command

EPILOG = """examples:
  python -m benchmarks.coldstart
  python -m benchmarks.coldstart --repeats 15 --json coldstart.json
"""
EXAMPLE = ["examples/ankle-boot.png", "--labels", "examples/labels.txt"]


def measure(model: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Name -> wall time in milliseconds and peak memory in MB of a process."""
    command = [sys.executable, "-m", "edgeclip", "classify"]
    folder = bundle_for(model)
    with tempfile.TemporaryDirectory() as scratch:
        photo = f"{scratch}/photo.jpg"
        picture(4000, 3000).save(photo, quality=90)
        commands = {"edgeclip, embedded bundle": [*command, *EXAMPLE]}
        for precision in edgeclip.Bundle(folder).manifest.precisions:
            if precision != "fp16":  # which CPUs do not compute in
                options = [photo, *EXAMPLE[1:], "--bundle", str(folder), "--precision", precision]
                commands[f"edgeclip {model} {precision}, 12 megapixels"] = [*command, *options]
        for ours in commands.values():
            process(ours, 1)  # caches the labels
        commands["import open_clip"] = [sys.executable, "-c", "import open_clip"]
        return {name: process(words, repeats) for name, words in commands.items()}


def render(report: dict) -> str:
    """The report as Markdown."""
    peer = report["processes"]["import open_clip"][0]
    lines = ["| process | ms | import open_clip / it | peak memory, MB |", "|---|---|---|---|"]
    for name, (ms, megabytes) in report["processes"].items():
        lines.append(f"| {name} | {ms:.0f} | {peer / ms:.1f} | {megabytes:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, with random weights")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    report = {
        "machine": machine(),
        "versions": versions_of("edgeclip", "onnxruntime", "torch", "open_clip_torch"),
        "repeats": args.repeats,
        "processes": measure(args.model, args.repeats),
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
