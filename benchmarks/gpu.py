"""From frames to answers on an NVIDIA GPU, against open_clip with CLIPure-Cos's published loop in PyTorch.

Wall clock, in this process in turn, from what lies in the CPU's memory to what lies there again: frames of
640x480, the encoder's pixels, embeddings, answers. edgeclip runs by CUDA and, where TensorRT is
installed, by an engine that is built first; what does not work is named and left out. open_clip is taken
eager, in float32 (without TensorFloat-32) and under autocast to float16, with its own transform on the
CPU; and once more with the frame resized on the GPU, which is faster and not quite open_clip's pixels.
The weights are random, which does not change the time. Memory is what the GPU has less of.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

import edgeclip
from benchmarks.kernels import STEP_SIZE, STEPS, published_loop
from benchmarks.latency import bundle_for, picture, versions_of
from benchmarks.purification import label_set
from benchmarks.timing import publish, samples_ms
from edgeclip.cli.command import run_command
from edgeclip.tools.bench import percentiles

EPILOG = """examples:
  python -m benchmarks.gpu
  python -m benchmarks.gpu --model ViT-L-14 --batch-size 1 8 --json gpu.json

exit status: 1 where there is no NVIDIA GPU, or nothing of edgeclip runs on it.
"""
FRAME = 640, 480  # width, height
PRECISIONS = ("fp32", "fp16")
STAGES = ("frames to answers", "pixels to answers", "encoder")
PEER = "open_clip fp32"

Calls = dict[str, Callable[[], object]]  # by stage


class OpenClip:
    """open_clip's image encoder, eager, and what follows it, on a device of PyTorch's.

    classes: unit rows (K, D); null_text: unit (D,). half: under autocast to float16. resize: the frames
    on the device, and not by open_clip's transform.
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
        """The encoder's input (N, 3, H, W): on the CPU, or where it was resized."""
        if not self.resize:
            return torch.stack([self.transform(Image.fromarray(frame)) for frame in frames])
        return torch.stack([self._resized(frame) for frame in frames])

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, D) on the device, not normalised."""
        with torch.no_grad(), torch.autocast(self.device, torch.float16, enabled=self.half):
            return self.model.encode_image(pixels.to(self.device)).float()

    def answer(self, pixels: torch.Tensor, top_k: int = 5) -> tuple[np.ndarray, np.ndarray]:
        """Indices and probabilities (N, k)."""
        u = published_loop(self.encode(pixels), self.null_text)
        with torch.no_grad():
            logits = self.model.logit_scale.exp() * u @ self.classes.T
            values, indices = logits.softmax(1).topk(top_k)
        return indices.cpu().numpy(), values.cpu().numpy()

    def calls(self, frames: Sequence[np.ndarray]) -> Calls:
        pixels = self.pixels(frames).cpu()
        return {
            "frames to answers": lambda: self.answer(self.pixels(frames)),
            "pixels to answers": lambda: self.answer(pixels),
            "encoder": lambda: self.encode(pixels).cpu(),
        }

    def _resized(self, frame: np.ndarray) -> torch.Tensor:
        """Shorter side to the encoder's, the middle of it."""
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
    pixels = rt.preprocess(frames)
    return {
        "frames to answers": lambda: rt.classify(frames, labels),
        "pixels to answers": lambda: rt.classify_pixels(pixels, labels),
        "encoder": lambda: rt.encode(pixels),
    }


def measure(
    competitors: dict[str, Callable[[Sequence[np.ndarray]], Calls]],
    batches: Sequence[int],
    repeats: int,
) -> list[dict[str, Any]]:
    """A row for each batch, stage and competitor, in milliseconds; the competitors take turns."""
    frame = np.array(picture(*FRAME))
    rows = []
    for batch in batches:
        made = {name: calls([frame] * batch) for name, calls in competitors.items()}
        for stage in STAGES:
            found = samples_ms({name: calls[stage] for name, calls in made.items()}, repeats)
            rows += [
                {"batch": batch, "stage": stage, "name": name} | percentiles(times)
                for name, times in found.items()
            ]
    return rows


def build_engine(bundle: Path, precision: str, max_batch: int) -> str:
    """What is wrong where there is no engine then; nothing where there is one."""
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed"
    command = [sys.executable, "-m", "edgeclip", "build", str(bundle)]
    command += ["--precision", precision, "--max-batch", str(max_batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def open_runtimes(bundle: Path, max_batch: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Those of edgeclip's that work, with the GPU's memory they take in MB; the errors of others."""
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
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 1e6


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"| batch | | images/s | {' | '.join(f'{s}, p50 / p99' for s in STAGES)} | {PEER} / it |",
        "|---" * (len(STAGES) + 4) + "|",
    ]
    found = {(row["batch"], row["stage"], row["name"]): row for row in report["rows"]}
    whole = STAGES[0]
    for batch in dict.fromkeys(row["batch"] for row in report["rows"]):
        peer = found[batch, whole, PEER]["p50"]
        for name in dict.fromkeys(row["name"] for row in report["rows"]):
            own = [found[batch, stage, name] for stage in STAGES]
            cells = [f"{row['p50']:.2f} / {row['p99']:.2f}" for row in own]
            rate = 1e3 * batch / own[0]["p50"]
            ratio = peer / own[0]["p50"]
            lines.append(f"| {batch} | {name} | {rate:.0f} | {' | '.join(cells)} | {ratio:.1f} |")
    memory = ", ".join(f"{name} {mb:.0f}" for name, mb in report["gpu_mb"].items())
    lines += [
        "",
        (
            f"Milliseconds; frames of {FRAME[0]}x{FRAME[1]}, {report['labels']} labels, CLIPure-Cos "
            f"{STEPS} x {STEP_SIZE:g}. Memory of the GPU in MB: {memory}."
        ),
    ]
    lines += [f"Left out: {name}: {why}." for name, why in report["left out"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, with random weights")
    parser.add_argument("--labels", type=int, default=1000, help="classes (default: 1000)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 2, 4, 8], metavar="B")
    parser.add_argument("--repeats", type=int, default=200, help="runs of each (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: needs an NVIDIA GPU")

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    logging.disable(logging.WARNING)  # that the weights are random is the point
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
    ours = {
        name: lambda frames, rt=rt: our_calls(rt, label_set(rt, args.labels), frames)
        for name, (rt, _) in opened.items()
    }
    theirs = {name: peer.calls for name, peer in peers.items()}
    report = {
        "machine": torch.cuda.get_device_name(),
        "versions": versions_of("edgeclip", "onnxruntime-gpu", "tensorrt", "open_clip_torch")
        | {"torch": torch.__version__},
        "model": args.model,
        "labels": args.labels,
        "repeats": args.repeats,
        "gpu_mb": gpu_mb,
        "left out": left_out,
        "rows": measure(ours | theirs, args.batch_size, args.repeats),
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    sys.exit(run_command(main))
