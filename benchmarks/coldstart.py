"""Cold start: the whole process `edgeclip classify` with cached labels, against `import open_clip`.

An answer by open_clip begins with its import. The weights of the larger model are random, which does
not change the time. Files are in the system's cache, as after a first run.
"""

from __future__ import annotations

import sys
import tempfile

import edgeclip
from benchmarks.common import (
    Report,
    add_model,
    add_repeats,
    build_parser,
    bundle_for,
    cpu_precisions,
    versions_of,
)
from benchmarks.timing import machine, process, publish
from edgeclip.bundle import EMBEDDED
from edgeclip.cli.command import run_command
from edgeclip.tools.pictures import picture

EPILOG = """examples:
  python -m benchmarks.coldstart
  python -m benchmarks.coldstart --repeats 15 --json coldstart.json
"""
EXAMPLE = ["examples/ankle-boot.png", "--labels", "examples/labels.txt"]


def measure(model: str, repeats: int) -> dict[str, tuple[float, float]]:
    """Return the wall time in milliseconds and the peak memory in MB of each process."""
    command = [sys.executable, "-m", "edgeclip", "classify"]
    folder = bundle_for(model)
    with tempfile.TemporaryDirectory() as scratch:
        photo = f"{scratch}/photo.jpg"
        picture(4000, 3000).save(photo, quality=90)
        commands = {
            f"edgeclip, {name}": [*command, *EXAMPLE, "--bundle", name] for name in EMBEDDED
        }
        for precision in cpu_precisions(edgeclip.Bundle(folder)):
            options = [photo, *EXAMPLE[1:], "--bundle", str(folder), "--precision", precision]
            commands[f"edgeclip {model} {precision}, 12 megapixels"] = [*command, *options]
        for ours in commands.values():
            process(ours, 1)  # caches the labels
        commands["import open_clip"] = [sys.executable, "-c", "import open_clip"]
        return {name: process(words, repeats) for name, words in commands.items()}


def render(report: Report) -> str:
    """Return the report as Markdown."""
    peer = report["processes"]["import open_clip"][0]
    lines = ["| process | ms | import open_clip / it | peak memory, MB |", "|---|---|---|---|"]
    for name, (ms, megabytes) in report["processes"].items():
        lines.append(f"| {name} | {ms:.0f} | {peer / ms:.1f} | {megabytes:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_model(parser)
    add_repeats(parser, 7)
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
