"""CUDA kernels against PyTorch on the same GPU, in the same run, by CUDA events.

Each call is timed twice: from Python, launches included, and in a CUDA graph of many calls, divided by
their number, which is nearly the GPU's own time. The peers are the same operations in PyTorch: normalise,
the published purification by gradient ascent, matmul, softmax and top-k; antialiased bicubic
interpolation, crop and normalise. In a graph, which has no autograd, the peer's gradient is written out.
Inputs stay in place, so that small ones are read from the L2 cache. The limit is the time that the bytes
take from the GPU's memory at the rate of a large copy.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common import (
    STEP_SIZE,
    STEPS,
    Report,
    add_repeats,
    build_parser,
    published_loop,
)
from benchmarks.timing import publish
from edgeclip import _core
from edgeclip.cli.command import run_command

EPILOG = """examples:
  python -m benchmarks.kernels
  python -m benchmarks.kernels --repeats 200 --json kernels.json
"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CALLS_PER_GRAPH = 20
WARM_UP = 5
CLASSIFICATIONS = [(1, 512, 1000), (8, 512, 1000), (64, 512, 1000), (1, 768, 21841)]  # N, D, K
FRAMES = {"12 megapixels": (3000, 4000), "640x480": (480, 640)}
SIZE = 224
cuda: Any = torch.cuda  # its events and streams are untyped


class Case(NamedTuple):
    """Operation of the core and of PyTorch."""

    name: str
    ours: Callable[[int], object]  # takes the stream
    torch_eager: Callable[[], object]
    torch_graph: Callable[[], object]
    bytes: int  # to read and write


def events_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time in milliseconds between the events around a call."""
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def graph_ms(call: Callable[[], object], repeats: int) -> float:
    """Return the median time in milliseconds of a call in a CUDA graph."""
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return events_ms(graph.replay, repeats) / CALLS_PER_GRAPH


def written_out_loop(z: torch.Tensor, null_text: torch.Tensor) -> torch.Tensor:
    """Return `published_loop` without autograd: both vectors have norm 1."""
    u = F.normalize(z, dim=1)
    for _ in range(STEPS):
        gradient = null_text - (u @ null_text)[:, None] * u
        u = F.normalize(u + STEP_SIZE * F.normalize(gradient, dim=1), dim=1)
    return u


def classify_case(n: int, d: int, k: int, dtype: torch.dtype) -> Case:
    """Return classification of n embeddings against k classes."""
    z = torch.randn(n, d, device="cuda").to(dtype)
    classes = F.normalize(torch.randn(k, d, device="cuda"), dim=1).to(dtype)
    null_text = F.normalize(torch.randn(d, device="cuda"), dim=0)
    arrays: dict[str, Any] = {
        "null_text": null_text,
        "null_scores": classes.float() @ null_text,
        "out_indices": torch.empty((n, 5), dtype=torch.int32, device="cuda"),
        "out_probabilities": torch.empty((n, 5), device="cuda"),
        "workspace": torch.zeros(_core.classify_workspace(n, k), dtype=torch.uint8, device="cuda"),
    }
    options: dict[str, Any] = {"logit_scale": 100.0, "steps": STEPS, "step_size": STEP_SIZE}
    like_z = null_text.to(dtype)

    def peer(loop: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> object:
        logits = 100.0 * loop(z, like_z).detach() @ classes.T
        return logits.float().softmax(1).topk(5)

    return Case(
        f"classify {n} x {d} x {k}, {str(dtype).removeprefix('torch.')}",
        lambda stream: _core.classify(z, classes, **arrays, **options, stream=stream),
        lambda: peer(published_loop),
        lambda: peer(written_out_loop),
        z.nbytes + classes.nbytes + 4 * (k + d) + 8 * 5 * n,
    )


def preprocess_case(name: str, height: int, width: int, dtype: torch.dtype) -> Case:
    """Return preprocessing of one frame."""
    frame = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device="cuda")
    out = torch.empty((3, SIZE, SIZE), dtype=dtype, device="cuda")
    workspace = torch.zeros(
        _core.preprocess_workspace(frame, out), dtype=torch.uint8, device="cuda"
    )
    mean, std = (torch.tensor(v, device="cuda").view(3, 1, 1) for v in (MEAN, STD))
    scale = SIZE / min(height, width)
    resized = [int(height * scale), int(width * scale)]
    top, left = ((side - SIZE) // 2 for side in resized)

    def peer() -> torch.Tensor:
        pixels = frame.permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(pixels, resized, mode="bicubic", antialias=True)[0]
        cropped = pixels[:, top : top + SIZE, left : left + SIZE].clamp(0, 1)
        return ((cropped - mean) / std).to(dtype)

    return Case(
        f"preprocess {name}, {str(dtype).removeprefix('torch.')}",
        lambda stream: _core.preprocess(
            frame, out, mean=MEAN, std=STD, workspace=workspace, stream=stream
        ),
        peer,
        peer,
        3 * min(height, width) ** 2 + out.nbytes,  # only the part of the frame that the crop needs
    )


def cases() -> Iterator[Case]:
    """Yield the operations at the sizes that are reported."""
    for dtype in (torch.float32, torch.float16):
        for n, d, k in CLASSIFICATIONS:
            yield classify_case(n, d, k, dtype)
        for name, (height, width) in FRAMES.items():
            yield preprocess_case(name, height, width, dtype)


def copy_bandwidth(repeats: int) -> float:
    """Return the bytes per second, read and written, of a large copy in the GPU's memory."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * events_ms(lambda: target.copy_(source), repeats))


def measure(case: Case, bandwidth: float, repeats: int) -> dict[str, float]:
    """Return the milliseconds of each side, and the limit."""

    def ours() -> object:
        return case.ours(torch.cuda.current_stream().cuda_stream)

    return {
        "edgeclip": events_ms(ours, repeats),
        "torch": events_ms(case.torch_eager, repeats),
        "edgeclip in a graph": graph_ms(ours, repeats),
        "torch in a graph": graph_ms(case.torch_graph, repeats),
        "limit": 1e3 * case.bytes / bandwidth,
    }


def render(report: Report) -> str:
    """Return the report as Markdown."""
    columns = list(next(iter(report["ms"].values())))
    lines = [
        f"| microseconds | {' | '.join(columns)} | torch in a graph / edgeclip |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, ms in report["ms"].items():
        ratio = ms["torch in a graph"] / ms["edgeclip in a graph"]
        cells = " | ".join(f"{1e3 * ms[column]:.1f}" for column in columns)
        lines.append(f"| {name} | {cells} | {ratio:.1f} |")
    moved = report["bytes_per_second"] / 1e9
    lines += ["", f"CLIPure-Cos {STEPS} x {STEP_SIZE:g}; a large copy moves {moved:.0f} GB/s."]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_repeats(parser, 100)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels: needs an NVIDIA GPU")
    if not _core.cuda_built():
        sys.exit("benchmarks.kernels: edgeclip was built without CUDA; see make gpu-bench")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(args.repeats)
    report = {
        "machine": device,
        "versions": {"edgeclip": version("edgeclip"), "torch": torch.__version__},
        "cuda": torch.version.cuda,
        "bytes_per_second": bandwidth,
        "repeats": args.repeats,
        "ms": {case.name: measure(case, bandwidth, args.repeats) for case in cases()},
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
