"""From frames to answers on an NVIDIA GPU, against open_clip with CLIPure-Cos's published loop in PyTorch.

All take turns in one process; wall clock from data in the CPU's memory to results there: frames of
640x480, the encoder's pixels, embeddings, answers. edgeclip runs on CUDA and, if TensorRT is installed, on
an engine that is built first; backends that fail are named and left out. open_clip runs eager, in float32
(without TensorFloat-32) and under autocast to float16, with its own transform on the CPU; and once more
with the frame resized on the GPU, which is faster but gives slightly different pixels. The weights are
random, which does not change the time. Memory is the decrease of the GPU's free memory.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

import edgeclip
from benchmarks.common import (
    STEP_SIZE,
    STEPS,
    Report,
    add_model,
    add_repeats,
    build_parser,
    bundle_for,
    label_set,
    published_loop,
    versions_of,
)
from benchmarks.timing import publish, samples_ms
from edgeclip.cli.command import run_command
from edgeclip.tools.bench import percentiles
from edgeclip.tools.pictures import picture

EPILOG = """examples:
  python -m benchmarks.gpu
  python -m benchmarks.gpu --model ViT-L-14 --batch-size 1 8 --json gpu.json

exit status: 1 without an NVIDIA GPU, or if edgeclip does not run on it.
"""
FRAME = 640, 480  # width, height
PRECISIONS = ("fp32", "fp16")
STAGES = ("frames to answers", "pixels to answers", "encoder")
PEER = "open_clip fp32"

Calls = dict[str, Callable[[], object]]  # by stage


class OpenClip:
    """open_clip's eager image encoder, purification and classification on a PyTorch device.

    classes: unit rows (K, D). null_text: unit (D,). half: run under autocast to float16. resize: resize
    the frames on the device instead of by open_clip's transform.
    """

    def __init__(
        self,
        model: Any,
        transform: Callable[[Image.Image], torch.Tensor],
        classes: np.ndarray,
        null_text: np.ndarray,
        *,
        device: str = "cuda",
        half: bool = False,
        resize: bool = False,
    ) -> None:
        self.model, self.transform = model.to(device), transform
        self.classes = torch.tensor(classes, device=device)
        self.null_text = torch.tensor(null_text, device=device)
        self.device, self.half, self.resize = device, half, resize
        self.mean, self.std = (
            torch.tensor(values, device=device).view(3, 1, 1)
            for values in (model.visual.image_mean, model.visual.image_std)
        )

    def pixels(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the encoder's input (N, 3, H, W), on the CPU unless the device resized it."""
        if not self.resize:
            return torch.stack([self.transform(Image.fromarray(frame)) for frame in frames])
        return torch.stack([self._resized(frame) for frame in frames])

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D) on the device, not normalised."""
        with torch.no_grad(), torch.autocast(self.device, torch.float16, enabled=self.half):
            embeddings: torch.Tensor = self.model.encode_image(pixels.to(self.device))
            return embeddings.float()

    def answer(self, pixels: torch.Tensor, top_k: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Return indices and probabilities (N, k)."""
        u = published_loop(self.encode(pixels), self.null_text)
        with torch.no_grad():
            logits = self.model.logit_scale.exp() * u @ self.classes.T
            values, indices = logits.softmax(1).topk(top_k)
        return indices.cpu().numpy(), values.cpu().numpy()

    def calls(self, frames: Sequence[np.ndarray]) -> Calls:
        """Return a call for each stage."""
        pixels = self.pixels(frames).cpu()
        return {
            "frames to answers": lambda: self.answer(self.pixels(frames)),
            "pixels to answers": lambda: self.answer(pixels),
            "encoder": lambda: self.encode(pixels).cpu(),
        }

    def _resized(self, frame: np.ndarray) -> torch.Tensor:
        """Return a frame resized to the encoder's side by its shorter side, and cropped at the centre."""
        side = open_clip.transform.to_2tuple(self.model.visual.image_size)[0]
        image = torch.from_numpy(frame).to(self.device).permute(2, 0, 1)[None].float() / 255
        scale = side / min(image.shape[2:])
        size = [int(scale * length) for length in image.shape[2:]]
        image = F.interpolate(image, size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        return (image[:, top : top + side, left : left + side] - self.mean) / self.std


def our_calls(
    rt: edgeclip.Runtime, labels: edgeclip.LabelSet, frames: Sequence[np.ndarray]
) -> Calls:
    """Return a call of a Runtime for each stage."""
    pixels = rt.preprocess(frames)
    return {
        "frames to answers": lambda: rt.classify(frames, labels),
        "pixels to answers": lambda: rt.classify_pixels(pixels, labels),
        "encoder": lambda: rt.encode(pixels),
    }


def measure(
    competitors: Mapping[str, Callable[[Sequence[np.ndarray]], Calls]],
    batches: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """Return a row for each batch, stage and competitor, in milliseconds; competitors take turns."""
    frame = np.array(picture(*FRAME))
    rows = []
    for batch in batches:
        calls = {name: make([frame] * batch) for name, make in competitors.items()}
        for stage in STAGES:
            samples = samples_ms({name: stages[stage] for name, stages in calls.items()}, repeats)
            rows += [
                {"batch": batch, "stage": stage, "name": name} | percentiles(times)
                for name, times in samples.items()
            ]
    return rows


def build_engine(bundle: Path, precision: str, max_batch: int) -> str:
    """Build an engine in another process; return the error, "" for success."""
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed"
    command = [sys.executable, "-m", "edgeclip", "build", str(bundle)]
    command += ["--precision", precision, "--max-batch", str(max_batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def open_runtimes(bundle: Path, max_batch: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the Runtimes that work, with their GPU memory in MB, and the errors of the others."""
    opened: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for device in ("cuda", "tensorrt"):
        for precision in PRECISIONS:
            name = f"edgeclip {device} {precision}"
            problem = build_engine(bundle, precision, max_batch) if device == "tensorrt" else ""
            if problem:
                left_out[name] = problem
                continue
            before = free_mb()
            try:
                rt = edgeclip.Runtime(
                    bundle,
                    device=device,
                    precision=precision,
                    purify=edgeclip.CosPurifier(STEPS, STEP_SIZE),
                    batch_size=max_batch,
                )
                rt.classify(np.array(picture(*FRAME)), label_set(rt, 10))
            except edgeclip.EdgeclipError as err:
                left_out[name] = str(err)
                continue
            opened[name] = rt, before - free_mb()
    return opened, left_out


def free_mb() -> float:
    """Return the free memory of the GPU in MB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e6


def render(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"| batch | | images/s | {' | '.join(f'{s}, p50 / p99' for s in STAGES)} | {PEER} / it |",
        "|---" * (len(STAGES) + 4) + "|",
    ]
    by_key = {(row["batch"], row["stage"], row["name"]): row for row in report["rows"]}
    whole = STAGES[0]
    for batch in dict.fromkeys(row["batch"] for row in report["rows"]):
        peer = by_key[batch, whole, PEER]["p50"]
        for name in dict.fromkeys(row["name"] for row in report["rows"]):
            stages = [by_key[batch, stage, name] for stage in STAGES]
            cells = [f"{row['p50']:.2f} / {row['p99']:.2f}" for row in stages]
            rate = 1e3 * batch / stages[0]["p50"]
            ratio = peer / stages[0]["p50"]
            lines.append(f"| {batch} | {name} | {rate:.0f} | {' | '.join(cells)} | {ratio:.1f} |")
    memory = ", ".join(f"{name} {mb:.0f}" for name, mb in report["gpu_mb"].items())
    lines += [
        "",
        (
            f"Milliseconds; frames of {FRAME[0]}x{FRAME[1]}, {report['labels']} labels, CLIPure-Cos "
            f"{STEPS} x {STEP_SIZE:g}. Memory of the GPU in MB: {memory}."
        ),
    ]
    lines += [f"Left out: {name}: {why}." for name, why in report["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_model(parser)
    parser.add_argument(
        "--labels", type=int, default=1000, help="number of classes (default: 1000)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        metavar="B",
        help="images at once (default: 1 2 4 8)",
    )
    add_repeats(parser, 200)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: needs an NVIDIA GPU")

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    opened, left_out = open_runtimes(
        bundle_for(args.model, PRECISIONS), max_batch=max(args.batch_size)
    )
    if not opened:
        sys.exit(
            f"benchmarks.gpu: edgeclip does not run on the GPU: {next(iter(left_out.values()))}"
        )
    first, _ = next(iter(opened.values()))
    labels = label_set(first, args.labels)
    before = free_mb()
    model, _, transform = open_clip.create_model_and_transforms(args.model)
    peers = {
        name: OpenClip(
            model.eval(),
            transform,
            labels.embeddings,
            first.bundle.null_text,
            half=half,
            resize=gpu,
        )
        for name, half, gpu in (
            (PEER, False, False),
            ("open_clip fp16", True, False),
            ("open_clip fp16, resized on the GPU", True, True),
        )
    }
    peers[PEER].answer(peers[PEER].pixels([np.array(picture(*FRAME))]))
    gpu_mb = {name: mb for name, (_, mb) in opened.items()} | {PEER: before - free_mb()}
    # A label set belongs to the text encoder of a precision.
    ours: dict[str, Callable[[Sequence[np.ndarray]], Calls]] = {
        name: partial(our_calls, rt, label_set(rt, args.labels)) for name, (rt, _) in opened.items()
    }
    theirs: dict[str, Callable[[Sequence[np.ndarray]], Calls]] = {
        name: peer.calls for name, peer in peers.items()
    }
    report = {
        "machine": torch.cuda.get_device_name(),
        "versions": versions_of("edgeclip", "onnxruntime-gpu", "tensorrt", "open_clip_torch")
        | {"torch": torch.__version__},
        "model": args.model,
        "labels": args.labels,
        "repeats": args.repeats,
        "gpu_mb": gpu_mb,
        "left_out": left_out,
        "rows": measure(ours | theirs, args.batch_size, args.repeats),
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
