"""The tables and pictures of docs/PERFORMANCE.md and docs/jetson.md, from the benchmarks' JSON files.

    python -m benchmarks.report --run     # all that is shown of such a processor, then the documents
    python -m benchmarks.report           # the documents only

A result of a processor without VNNI, where int8 is slower, has a file and a table of its own: NAME-avx2.
A document has a pair of marks for each table that it shows, `<!-- benchmarks.NAME -->` and
`<!-- /benchmarks.NAME -->`; what is between them is replaced. NAME is that of a file in
docs/results/performance/, which begins with the benchmark's; or `roofline`, which is worked out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import headline
from edgeclip import host, storage
from train import documents

RESULTS = Path("docs/results/performance")
PLOTS = Path("docs/plots")
DOCUMENTS = (Path("docs/PERFORMANCE.md"), Path("docs/jetson.md"))
PREFIX = "benchmarks."
RUNS = {
    "coldstart": [],
    "memory": [],
    "latency": [],
    "core": [],
    "text": [],
    "text-fp32": ["--precision", "fp32"],
    "throughput": [],
    "scaling": [],
}
# Of processors without VNNI what has int8 in it, as NAME-avx2.
WITHOUT_VNNI = ("coldstart", "memory", "latency", "text")


def run(names: list[str]) -> None:
    """Run benchmarks, all by default, each in a process of its own; missed limits end none."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    kind, every = ("-avx2", WITHOUT_VNNI) if host.vector_units().endswith("no VNNI") else ("", RUNS)
    for name in names or every:
        module = f"benchmarks.{name.partition('-')[0]}"
        out = RESULTS / f"{name}{kind}.json"
        print(f"{module} {' '.join(RUNS[name])}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", module, *RUNS[name], "--json", str(out)]
        done = subprocess.run(command, check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"error: {module} failed")


def load(name: str) -> dict:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"error: {path} is missing: python -m benchmarks.report --run {name}")
    return json.loads(path.read_text(encoding="utf-8"))


def targets() -> str:
    """What was aimed at beside what the results say."""
    encoders, photo = load("latency")["encoders"]["ms"], load("latency")["images"]["12 megapixels"]
    text, memory = load("text"), load("memory")["mb"]["edgeclip int8"]
    first = (
        min(ms for name, ms in text["ms"].items() if name != "edgeclip") / text["ms"]["edgeclip"]
    )
    start = load("coldstart")["processes"]
    (photo_start,) = (ms for name, (ms, _) in start.items() if "int8" in name)
    small = load("throughput")["images_per_second"]["320x240"]
    core = {row["operation"]: row for row in load("core")["rows"]}
    rows = []
    if "OpenVINO fp32" in encoders:  # where it is installed
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
        ("1,000 cached labels x 80 templates", "at most", 50, text["cached ms"], " ms"),
        ("folder of 320x240, share of the encoder alone", "at least", 90,
         100 * small["share of encoder"], " %"),
        ("int8, image encoder, resident", "at most", 170, memory["image encoder"][0], " MB"),
        ("int8, both encoders, resident", "at most", 280, memory["with the text encoder"][0], " MB"),
        ("command to answer, int8, 12 megapixels", "at most", 800, photo_start, " ms"),
        *(
            (f"{name}, time of its limit = 1", "at most", row["limit"], row["ratio"], "")
            for name, row in core.items() if not name.startswith("preprocess")
        ),
    ]  # fmt: skip
    lines = ["| what | aim | measured | |", "|---|---|---|---|"]
    for what, way, aim, found, unit in rows:
        good = found <= aim if way == "at most" else found >= aim
        lines.append(
            f"| {what} | {way} {aim:g}{unit} | {found:.3g}{unit} | {'' if good else 'missed'} |"
        )
    return "\n".join(lines)


def table(name: str) -> str:
    """A result as Markdown: its tables, and what it was measured on."""
    if name == "targets":
        return targets()
    if name == "roofline":
        roofline = importlib.import_module("benchmarks.roofline")
        return roofline.render(roofline.compute())
    report = load(name)
    module = importlib.import_module(f"benchmarks.{name.partition('-')[0]}")
    return f"{module.render(report)}\n\n({headline(report)})"


def draw() -> None:
    """How the encoder's time grows with the batch, and that of the image stages with its size."""
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
    width, height = map(int, size.split("x"))
    return width * height


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", nargs="*", choices=RUNS, metavar="NAME", help="all without a NAME")
    args = parser.parse_args()
    if args.run is not None:
        run(args.run)
    for document in DOCUMENTS:
        print(f"{document}: {documents.update(document, PREFIX, table)} tables")
    draw()


if __name__ == "__main__":
    main()
