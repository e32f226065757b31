"""Bounds and expected times of NVIDIA Jetsons: arithmetic, not measurements.

The bound is the longer of two times at the device's peak: the time of the operations, and the time of the
bytes that must pass through memory whatever the caches hold (the weights once for each batch, pixels in,
embeddings out). The expected time uses the shares of the peaks in EFFICIENCY, and assumes that every
tensor between two kernels of the encoder is written to memory and read again. Launches are not counted:
times far below a tenth of a millisecond will be longer.

fp16 is the rate of the tensor cores without sparsity, fp32 that of the other cores without
TensorFloat-32. The image encoder is the exported one: for the embedding alone, its last block computes
one token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip import get_model_config

from benchmarks.common import Report, build_parser
from edgeclip import storage
from edgeclip.cli.command import run_command
from edgeclip.json_output import to_json

EPILOG = """examples:
  python -m benchmarks.roofline
  python -m benchmarks.roofline --json roofline.json
"""
EFFICIENCY = {"operations": 0.5, "memory": 0.7}  # assumed: typical of good kernels
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")
BATCHES = (1, 8)
BYTES = {"fp16": 2, "fp32": 4}
FRAMES = {"640x480": (480, 640), "12 megapixels": (3000, 4000)}
CLASSES = 1000
MLP = 4  # width of the hidden layer, in widths of the model
PIXELS = 3  # channels
RESULTS = Path("docs/results/performance")
CUBIC = 4  # support of a bicubic filter in pixels, times the scale


@dataclass(frozen=True)
class Device:
    """Peak rates of a GPU, from NVIDIA's data sheet or as units times clock."""

    multiprocessors: int
    mhz: float
    tensor: int  # fp16 operations of a multiprocessor's tensor cores per clock, without sparsity
    bandwidth: float  # GB/s
    source: str
    cores: int = 128  # fp32 cores of a multiprocessor
    cores_mhz: float | None = None  # clock of these cores if it differs

    @property
    def fp16(self) -> float:
        """Peak of the tensor cores in TFLOPS."""
        return self.multiprocessors * self.tensor * self.mhz / 1e6

    @property
    def fp32(self) -> float:
        """Peak of the other cores in TFLOPS: a core multiplies and adds in one clock."""
        return self.multiprocessors * self.cores * 2 * (self.cores_mhz or self.mhz) / 1e6


AMPERE, HOPPER, THOR = 2048, 4096, 8192
DEVICES = {
    "Orin Nano 8GB": Device(
        8, 625, AMPERE, 68, "Jetson Orin Nano Series data sheet: 1024 cores, 625 MHz, 40 TOPS"
    ),
    "Orin Nano 8GB Super": Device(
        8, 1020, AMPERE, 102, "Jetson Orin Nano Super Developer Kit data sheet: 1020 MHz, 67 TOPS"
    ),
    "Orin NX 16GB": Device(
        8, 918, AMPERE, 102.4, "Jetson Orin NX Series data sheet: 1024 cores, 918 MHz"
    ),
    "AGX Orin 64GB": Device(
        16, 1300, AMPERE, 204.8, "Jetson AGX Orin Series technical brief: 2048 cores, 1.3 GHz"
    ),
    "Thor T5000": Device(
        20, 1575, THOR, 273, "Jetson Thor Series data sheet: 2560 cores, 1.57 GHz, 2070 FP4 TFLOPS"
    ),
    "H100 SXM": Device(
        132, 1830, HOPPER, 3350, "H100 data sheet: 989 and 67 TFLOPS, 3.35 TB/s", cores_mhz=1980
    ),
}


@dataclass(frozen=True)
class Work:
    """Operations and memory traffic of one call on a batch."""

    flop: float  # two for each multiply-add
    bytes: float  # through memory
    between: float = 0.0  # bytes of tensors between kernels, which a cache may hold


@dataclass(frozen=True)
class Vit:
    """Vision transformer with a class token."""

    size: int
    patch: int
    width: int
    layers: int
    dim: int

    @classmethod
    def named(cls, model: str) -> Vit:
        """Return the encoder of an open_clip configuration."""
        config = get_model_config(model)
        vision = config["vision_cfg"]
        size, patch, width = (vision[key] for key in ("image_size", "patch_size", "width"))
        return cls(size, patch, width, vision["layers"], config["embed_dim"])

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.size // self.patch) ** 2

    def block(self, queries: int) -> int:
        """Return the operations of a block that computes `queries` of its tokens."""
        tokens, width = self.patches + 1, self.width
        projections = 2 * tokens * width * 3 * width + 2 * queries * width * width
        attention = 2 * 2 * queries * tokens * width
        return projections + attention + 2 * 2 * queries * width * MLP * width

    def flop(self, whole: bool = False) -> int:
        """Return the operations for one image.

        whole: with every token of the last block, as open_clip computes it.
        """
        embed = 2 * self.patches * PIXELS * self.patch**2 * self.width
        last = self.block(self.patches + 1 if whole else 1)
        full = (self.layers - 1) * self.block(self.patches + 1)
        return embed + full + last + 2 * self.width * self.dim

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        width = self.width
        block = (4 + 2 * MLP) * width**2 + (4 + MLP + 1) * width + 4 * width
        embed = PIXELS * self.patch**2 * width + (self.patches + 2) * width
        return embed + self.layers * block + 4 * width + width * self.dim

    def work(self, batch: int, size: int) -> Work:
        """Return the work of a batch.

        size: bytes of a number in memory and between kernels; pixels and embeddings are float32.
        """
        ends = 4 * (PIXELS * self.size**2 + self.dim)
        # A block writes both norms, queries, keys and values, the mixed values, both sums and the
        # hidden layer.
        tensors = (2 + 3 + 1 + 2 + MLP) * (self.patches + 1) * self.width * self.layers
        return Work(
            batch * self.flop(),
            self.parameters * size + batch * ends,
            batch * 2 * size * tensors,
        )


def preprocess(height: int, width: int, side: int = 224) -> Work:
    """Return the work from a frame's crop in uint8 to float32 pixels: two passes of a bicubic filter."""
    short = min(height, width)
    taps = CUBIC * max(1.0, short / side)
    operations = 2 * taps * PIXELS * (short * side + side * side)
    return Work(operations, PIXELS * short**2 + 4 * PIXELS * side**2, 2 * PIXELS * short * side)


def classify(batch: int, dim: int, size: int) -> Work:
    """Return the work of all class scores; CLIPure-Cos adds one dot product and scalars."""
    moved = (CLASSES + batch) * dim * size + 4 * CLASSES
    return Work(batch * 2 * (CLASSES + 2) * dim, moved, 2 * 4 * batch * CLASSES)


def milliseconds(work: Work, device: Device, precision: str) -> dict[str, float]:
    """Return the bound and the expected time in milliseconds."""
    peak = 1e9 * (device.fp16 if precision == "fp16" else device.fp32)
    memory = 1e6 * device.bandwidth
    return {
        "bound": max(work.flop / peak, work.bytes / memory),
        "expected": max(
            work.flop / (peak * EFFICIENCY["operations"]),
            (work.bytes + work.between) / (memory * EFFICIENCY["memory"]),
        ),
    }


def works() -> Iterator[tuple[str, int, str, Work]]:
    """Yield the name, batch, precision and work of each call."""
    for precision, size in BYTES.items():
        for model in MODELS:
            for batch in BATCHES:
                yield model, batch, precision, Vit.named(model).work(batch, size)
    for name, shape in FRAMES.items():
        yield f"preprocess {name}", 1, "fp32", preprocess(*shape)
    for batch in BATCHES:
        yield f"classify {CLASSES:,}", batch, "fp32", classify(batch, 512, 4)


# Kernels of docs/results/performance/kernels-h100.json, measured in a CUDA graph.
KERNELS = {
    "classify 1 x 512 x 1000, float32": classify(1, 512, 4),
    "classify 8 x 512 x 1000, float32": classify(8, 512, 4),
    "preprocess 640x480, float32": preprocess(*FRAMES["640x480"]),
    "preprocess 12 megapixels, float32": preprocess(*FRAMES["12 megapixels"]),
}


def compare() -> dict[str, dict[str, float]]:
    """Return milliseconds of the core's kernels on an H100: bound, expected and measured."""
    measured = json.loads((RESULTS / "kernels-h100.json").read_text(encoding="utf-8"))["ms"]
    return {
        name: milliseconds(work, DEVICES["H100 SXM"], "fp32")
        | {"measured": measured[name]["edgeclip in a graph"]}
        for name, work in KERNELS.items()
    }


def compute() -> dict[str, Any]:
    """Return the report."""
    return {
        "what": "arithmetic, not measurements",
        "efficiency": EFFICIENCY,
        "devices": {
            name: {
                "fp16_tflops": d.fp16,
                "fp32_tflops": d.fp32,
                "gb_per_s": d.bandwidth,
                "source": d.source,
            }
            for name, d in DEVICES.items()
        },
        "models": {
            name: {"gflop": Vit.named(name).flop() / 1e9, "parameters": Vit.named(name).parameters}
            for name in MODELS
        },
        "rows": [
            {
                "name": name,
                "batch": batch,
                "precision": precision,
                "gflop": work.flop / 1e9,
                "mb": work.bytes / 1e6,
                "mb_between_kernels": work.between / 1e6,
                "ms": {key: milliseconds(work, d, precision) for key, d in DEVICES.items()},
            }
            for name, batch, precision, work in works()
        ],
        "h100_kernels_ms": compare(),
    }


def render(report: Report) -> str:
    """Return the report as Markdown."""
    devices, efficiency = report["devices"], report["efficiency"]
    lines = [
        (
            "Arithmetic, not measurements: bound / expected at "
            f"{efficiency['operations']:.0%} of the operations and "
            f"{efficiency['memory']:.0%} of the bandwidth."
        ),
        "",
        "| device | fp16, TFLOPS | fp32, TFLOPS | memory, GB/s | from |",
        "|---|---|---|---|---|",
    ]
    for name, d in devices.items():
        peaks = f"{d['fp16_tflops']:.1f} | {d['fp32_tflops']:.1f} | {d['gb_per_s']:g}"
        lines.append(f"| {name} | {peaks} | {d['source']} |")
    lines += [
        "",
        f"| milliseconds for the batch | GFLOP | MB | {' | '.join(devices)} |",
        "|---" * (3 + len(devices)) + "|",
    ]
    for row in report["rows"]:
        cells = [f"{_short(ms['bound'])} / {_short(ms['expected'])}" for ms in row["ms"].values()]
        what = f"{row['name']} {row['precision']}, batch {row['batch']}"
        amounts = f"{_short(row['gflop'])} | {_short(row['mb'])}"
        lines.append(f"| {what} | {amounts} | {' | '.join(cells)} |")
    lines += ["", "| H100, microseconds | bound | expected | measured |", "|---|---|---|---|"]
    for name, ms in report["h100_kernels_ms"].items():
        lines.append(f"| {name} | {' | '.join(_short(1e3 * value) for value in ms.values())} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Return a number with two significant digits and no exponent."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    args = parser.parse_args()
    report = compute()
    print(render(report))
    if args.json is not None:
        storage.write(args.json, to_json(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
