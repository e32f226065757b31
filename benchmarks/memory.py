"""Resident memory of a process after one run of its encoders, against open_clip.

Each row is its own process. The weights are random, which does not change the size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import edgeclip
from benchmarks.common import (
    Report,
    add_model,
    build_parser,
    bundle_for,
    cpu_precisions,
    versions_of,
)
from benchmarks.timing import machine, publish
from edgeclip.cli.command import run_command

EPILOG = """examples:
  python -m benchmarks.memory
  python -m benchmarks.memory --json memory.json
"""
RESIDENT = """
import json, sys

def resident():
    with open("/proc/self/status") as file:
        entries = dict(line.split(":", 1) for line in file)
    return [int(entries[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM")]

"""
OURS = (
    RESIDENT
    + """
import numpy, edgeclip
rt = edgeclip.Runtime(sys.argv[1], precision=sys.argv[2])
rt.embed_images(numpy.zeros((480, 640, 3), numpy.uint8))
image = resident()
rt.embed_texts(["a photo of a dog", "a cat"])
both = resident()
rt.release_text()
print(json.dumps({"image encoder": image, "with the text encoder": both, "released": resident()}))
"""
)
PEER = (
    RESIDENT
    + """
import logging
import open_clip, torch
logging.disable(logging.WARNING)
model = open_clip.create_model(sys.argv[1]).eval()
with torch.no_grad():
    model.encode_image(torch.zeros(1, 3, *model.visual.image_size))
    model.encode_text(open_clip.get_tokenizer(sys.argv[1])(["a photo of a dog", "a cat"]))
print(json.dumps({"with the text encoder": resident()}))
"""
)


def run(script: str, *arguments: str) -> dict[str, list[float]]:
    """Return, for each state that a script prints, resident memory and its peak so far in MB."""
    environment = os.environ | {"EDGECLIP_CACHE_SIZE": "0"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return cast(dict[str, list[float]], json.loads(done.stdout))


def render(report: Report) -> str:
    """Return the report as Markdown."""
    states = ("image encoder", "with the text encoder", "released")
    lines = [f"| resident, MB | {' | '.join(states)} | peak |", "|---" * (len(states) + 2) + "|"]
    for name, memory in report["mb"].items():
        cells = [f"{memory[state][0]:.0f}" if state in memory else "" for state in states]
        peak = max(peak for _, peak in memory.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_model(parser)
    args = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        sys.exit("benchmarks.memory: needs Linux's /proc")
    folder = bundle_for(args.model)
    precisions = cpu_precisions(edgeclip.Bundle(folder))
    for name in precisions:
        run(OURS, str(folder), name)  # a first start runs trials of both encoders
    memory = {f"edgeclip {name}": run(OURS, str(folder), name) for name in precisions}
    memory["open_clip fp32"] = run(PEER, args.model)
    report = {
        "machine": machine(),
        "versions": versions_of("edgeclip", "onnxruntime", "torch", "open_clip_torch"),
        "model": args.model,
        "mb": memory,
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
