"""Tables and plots of docs/PERFORMANCE.md and docs/jetson.md, from the benchmarks' JSON files.

    python -m benchmarks.report --run     # run the benchmarks, then update the documents
    python -m benchmarks.report           # update the documents

Results of a processor without VNNI, where int8 is slower, are in files and tables named NAME-avx2.
A document has a pair of marks for each table, `<!-- benchmarks.NAME -->` and
`<!-- /benchmarks.NAME -->`; the text between them is replaced. NAME is a file in
docs/results/performance/, whose first part is the benchmark's name, or `roofline`, which is computed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import cast

from benchmarks.common import Report
from benchmarks.timing import headline
from edgeclip import host, storage
from edgeclip.cli.command import run_command
from train import documents

RESULTS = Path("docs/results/performance")
PLOTS = Path("docs/plots")
DOCUMENTS = (Path("docs/PERFORMANCE.md"), Path("docs/jetson.md"))
PREFIX = "benchmarks."
RUNS: dict[str, list[str]] = {
    "coldstart": [],
    "memory": [],
    "latency": [],
    "core": [],
    "text": [],
    "text-fp32": ["--precision", "fp32"],
    "throughput": [],
    "scaling": [],
}
# Benchmarks with int8, which a processor without VNNI runs as NAME-avx2.
WITHOUT_VNNI = ("coldstart", "memory", "latency", "text")


def run(names: list[str]) -> None:
    """Run benchmarks, all by default, each in its own process; missed limits do not stop the run."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    without_vnni = host.vector_units().endswith("no VNNI")
    suffix = "-avx2" if without_vnni else ""
    for name in names or (WITHOUT_VNNI if without_vnni else RUNS):
        module = f"benchmarks.{name.partition('-')[0]}"
        out = RESULTS / f"{name}{suffix}.json"
        print(f"{module} {' '.join(RUNS[name])}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", module, *RUNS[name], "--json", str(out)]
        done = subprocess.run(command, check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"error: {module} failed")


def load(name: str) -> Report:
    """Return the result of a benchmark; exit if it is missing."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"error: {path} is missing: python -m benchmarks.report --run {name}")
    return cast(Report, json.loads(path.read_text(encoding="utf-8")))


def targets() -> str:
    """Return a table of the targets and the measured values."""
    encoders, photo = load("latency")["encoders"]["ms"], load("latency")["images"]["12 megapixels"]
    text, memory = load("text"), load("memory")["mb"]["edgeclip int8"]
    first = (
        min(ms for name, ms in text["ms"].items() if name != "edgeclip") / text["ms"]["edgeclip"]
    )
    start = load("coldstart")["processes"]
    (photo_start,) = (ms for name, (ms, _) in start.items() if "int8" in name)
    small = load("throughput")["images_per_second"]["320x240"]
    core = {row["operation"]: row for row in load("core")["rows"]}
    rows: list[tuple[str, str, float, float, str]] = []
    if "OpenVINO fp32" in encoders:  # an extra
        ratio = encoders["edgeclip fp32"] / encoders["OpenVINO fp32"]
        rows.append(("fp32 encoder, time of OpenVINO fp32 = 1", "at most", 1.15, ratio, ""))
    rows += [
        ("int8 encoder, times as fast as open_clip", "at least", 4,
         encoders["open_clip fp32"] / encoders["edgeclip int8"], ""),
        ("12-megapixel JPEG to answer, times as fast as the peer", "at least", 5,
         photo["end to end"]["open_clip"] / photo["end to end"]["edgeclip"], ""),
        ("12 megapixels preprocessed, times as fast as open_clip", "at least", 6,
         1 / core["preprocess 4000 x 3000"]["ratio"], ""),
        ("prompts encoded, times as fast as open_clip", "at least", 8, first, ""),
        ("1,000 cached labels x 80 templates", "at most", 50, text["cached_ms"], " ms"),
        ("folder of 320x240, share of the encoder alone", "at least", 90,
         100 * small["share_of_encoder"], " %"),
        ("int8, image encoder, resident", "at most", 170, memory["image encoder"][0], " MB"),
        ("int8, both encoders, resident", "at most", 280, memory["with the text encoder"][0], " MB"),
        ("command to answer, int8, 12 megapixels", "at most", 800, photo_start, " ms"),
        *(
            (f"{name}, time of its limit = 1", "at most", row["limit"], row["ratio"], "")
            for name, row in core.items() if not name.startswith("preprocess")
        ),
    ]  # fmt: skip
    lines = ["| what | aim | measured | |", "|---|---|---|---|"]
    for what, way, target, value, unit in rows:
        reached = value <= target if way == "at most" else value >= target
        lines.append(
            f"| {what} | {way} {target:g}{unit} | {value:.3g}{unit} | {'' if reached else 'missed'} |"
        )
    return "\n".join(lines)


def table(name: str) -> str:
    """Return the tables of a result as Markdown, with the machine they were measured on."""
    if name == "targets":
        return targets()
    if name == "roofline":
        roofline = importlib.import_module("benchmarks.roofline")
        return cast(str, roofline.render(roofline.compute()))
    report = load(name)
    module = importlib.import_module(f"benchmarks.{name.partition('-')[0]}")
    return f"{module.render(report)}\n\n({headline(report)})"


def draw() -> None:
    """Plot the encoder's time against the batch, and that of the image stages against the size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    report = load("scaling")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    threads = sorted({row["threads"] for row in report["rows"] if row["what"] == "encoder"})
    for count in threads:
        rows = [r for r in report["rows"] if (r["what"], r["threads"]) == ("encoder", count)]
        sizes = [int(row["size"].split()[-1]) for row in rows]
        (line,) = left.plot(
            sizes, [r["ms"] for r in rows], "o-", label=f"{count} thread{'s' if count > 1 else ''}"
        )
        limits = [r["limit_ms"] for r in rows]
        left.plot(sizes, limits, "--", color=line.get_color(), label="its limit")
    left.set(xlabel="batch", ylabel="ms", title=f"{report['model']} {report['precision']}")
    left.legend()
    for what, style in (("decode", "s-"), ("preprocess", "o-")):
        rows = [r for r in report["rows"] if r["what"] == what]
        rows = [r for r in rows if r["threads"] == max(row["threads"] for row in rows)]
        pixels = [pixels_of(row["size"]) / 1e6 for row in rows]
        right.plot(pixels, [row["ms"] for row in rows], style, label=f"{what}")
    right.set(xlabel="megapixels", ylabel="ms", xscale="log", yscale="log", title="image")
    right.legend()
    with storage.writing(PLOTS / "scaling.png") as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def pixels_of(size: str) -> int:
    """Return the number of pixels of WIDTHxHEIGHT."""
    width, height = map(int, size.split("x"))
    return width * height


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        nargs="*",
        choices=RUNS,
        metavar="NAME",
        help="run these benchmarks first (all without a NAME)",
    )
    args = parser.parse_args()
    if args.run is not None:
        run(args.run)
    for document in DOCUMENTS:
        print(f"{document}: {documents.update(document, PREFIX, table)} tables")
    draw()


if __name__ == "__main__":
    sys.exit(run_command(main))
