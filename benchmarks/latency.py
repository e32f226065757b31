"""Latency of one image, end to end and stage by stage, against open_clip with CLIPure-Cos.

Both sides purify with the published setting, run in this process in turn, and use all cores. The
weights are random, which does not change the time. The peer is what the paper's setting means in
PyTorch: Pillow decode, open_clip's transform, the eager float32 encoder, ten steps of gradient
ascent on the cosine with autograd, and the logits. The encoders are compared with OpenVINO too, on
the same ONNX file, where it is installed; the limit is that of their floating-point operations at
the rate of a large float32 matrix product in the same run.
"""

from __future__ import annotations

import argparse
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import edgeclip
from benchmarks.timing import machine, medians_ms, publish
from edgeclip import _core
from edgeclip.images.decoding import decode
from edgeclip.tools.bench import picture

EPILOG = """examples:
  python -m benchmarks.latency
  python -m benchmarks.latency --model ViT-L-14 --repeats 10 --json latency.json
"""
STEPS, STEP_SIZE = 10, 30.0
MATRIX = 2048  # rows of the matrix product that the limit is taken from


def clipure_cos(z: torch.Tensor, null_text: torch.Tensor) -> torch.Tensor:
    """Gradient ascent on cos(u, null text), section 1 of CLIPure in its own terms; z is (1, D)."""
    length = z.norm(dim=1, keepdim=True)
    u = z / length
    for _ in range(STEPS):
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cosine_similarity(u, null_text[None]).sum(), u)
        tangent = gradient / gradient.norm(dim=1, keepdim=True)
        u = F.normalize(u.detach() + STEP_SIZE * tangent, dim=1)
    return length * u


def bundle_for(model: str, precisions: Sequence[str] = ("fp32", "int8")) -> Path:
    """A bundle of the model with random weights in build/benchmarks; exported where it is missing."""
    of_others = "" if "int8" in precisions else "-".join(["", *precisions])
    folder = Path("build/benchmarks") / f"{model}{of_others}"
    if not (folder / "manifest.json").is_file():
        command = [sys.executable, "-m", "export", model, "--pretrained", "random", "--precision"]
        command += [*precisions, "-o", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def versions_of(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def openvino_encoders(path: Path, pixels: np.ndarray) -> dict[str, Callable[[], object]]:
    """OpenVINO on the same graph, tuned for latency; nothing where it is not installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    graph = core.read_model(path)
    graph.reshape(pixels.shape)
    calls = {}
    for name, precision in (("fp32", "f32"), ("bf16", "bf16")):
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(graph, "CPU", options).create_infer_request()
        calls[f"OpenVINO {name}"] = lambda request=request: request.infer({0: pixels})
    return calls


def encoder_flops(model: Any) -> int:
    """Floating-point operations of open_clip's image encoder for one image, two per multiply-add."""
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    # With gradients, without which attention takes a fused path that is not counted.
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, height, width))
    return counter.get_total_flops()


def measure_encoders(runtimes: dict[str, Any], model: Any, repeats: int) -> dict[str, Any]:
    """Milliseconds of one image through each encoder, and what its operations would take at least."""
    first = next(iter(runtimes.values()))
    pixels = first.preprocess([np.asarray(picture(640, 480))])
    tensor = torch.from_numpy(pixels)

    def eager() -> None:
        with torch.no_grad():
            model.encode_image(tensor)

    def autocast() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.encode_image(tensor)

    a, b = torch.rand(2, MATRIX, MATRIX)
    calls = {f"edgeclip {name}": lambda rt=rt: rt.encode(pixels) for name, rt in runtimes.items()}
    calls |= {"open_clip fp32": eager, "open_clip bf16": autocast}
    calls |= openvino_encoders(first.bundle.encoder("image_encoder", "fp32"), pixels)
    ms = medians_ms(calls | {"product": lambda: torch.mm(a, b)}, repeats)
    flops = encoder_flops(model)
    return {
        "limit fp32": ms.pop("product") * flops / (2 * MATRIX**3),
        "ms": ms,
        "gflop": flops / 1e9,
    }


def measure_image(rt: edgeclip.Runtime, model: Any, transform: Any, jpeg: bytes, args: Any) -> dict:
    """Stage by stage and end to end for one JPEG: {stage: {"edgeclip": ms, "open_clip": ms}}."""
    null_text = torch.from_numpy(rt.bundle.null_text.copy())
    label_set = edgeclip.LabelSet.random(args.labels, rt.bundle.null_text, rt.text_identity())
    classes = label_set.embeddings
    weights = torch.from_numpy(classes.copy())
    scale = model.logit_scale.exp()

    def peer_classify(z: torch.Tensor) -> torch.Tensor:
        logits = scale * F.normalize(clipure_cos(z, null_text), dim=1) @ weights.T
        return logits.detach().softmax(1).topk(5)

    def peer() -> torch.Tensor:
        pixels = transform(Image.open(io.BytesIO(jpeg)).convert("RGB"))[None]
        with torch.no_grad():
            z = model.encode_image(pixels)
        return peer_classify(z)

    decoded = decode(jpeg)
    image = Image.fromarray(decoded)
    pixels = rt.preprocess([decoded])
    tensor = torch.from_numpy(pixels)
    embedding = rt.encode(pixels)
    z = torch.from_numpy(embedding)
    purifier = {"null_text": rt.bundle.null_text, "null_scores": label_set.null_scores}
    purifier |= {"steps": STEPS, "step_size": STEP_SIZE}

    def peer_encode() -> torch.Tensor:
        with torch.no_grad():
            return model.encode_image(tensor)

    stages = {
        "decode": (
            lambda: decode(jpeg, fast_for=rt.bundle.manifest.image),
            lambda: Image.open(io.BytesIO(jpeg)).convert("RGB"),
        ),
        "preprocess": (lambda: rt.preprocess([decoded]), lambda: transform(image)),
        "encoder": (lambda: rt.encode(pixels), peer_encode),
        "classify": (
            lambda: _core.classify(embedding, classes, logit_scale=100.0, **purifier),
            lambda: peer_classify(z),
        ),
        "end to end": (lambda: rt.classify(jpeg, label_set), peer),
    }
    return {
        stage: medians_ms({"edgeclip": ours, "open_clip": theirs}, args.repeats)
        for stage, (ours, theirs) in stages.items()
    }


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    encoders = report["encoders"]
    peer = encoders["ms"]["open_clip fp32"]
    lines = [
        "| encoder, one image | ms | open_clip fp32 / it | of the fp32 limit |",
        "|---|---|---|---|",
    ]
    for name, ms in encoders["ms"].items():
        share = encoders["limit fp32"] / ms
        lines.append(f"| {name} | {ms:.1f} | {peer / ms:.2f} | {share:.0%} |")
    lines += [
        "",
        (
            f"{encoders['gflop']:.2f} GFLOP, at the rate of a large float32 product "
            f"{encoders['limit fp32']:.1f} ms; int8 and bf16 may go below that."
        ),
        "",
        f"| JPEG | stage, edgeclip {report['precision']} | edgeclip ms | open_clip ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, stages in report["images"].items():
        for stage, ms in stages.items():
            ours, theirs = ms["edgeclip"], ms["open_clip"]
            lines.append(f"| {name} | {stage} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} |")
    lines += ["", f"{report['labels']} labels, CLIPure-Cos {STEPS} x {STEP_SIZE:g}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, with random weights")
    parser.add_argument("--labels", type=int, default=1000, help="classes (default: 1000)")
    parser.add_argument("--repeats", type=int, default=40, help="runs of each (default: 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()

    bundle = edgeclip.Bundle(bundle_for(args.model))
    purifier = edgeclip.CosPurifier(STEPS, STEP_SIZE)
    runtimes = {
        name: edgeclip.Runtime(bundle, precision=name, purify=purifier)
        for name in bundle.manifest.precisions
        if name != "fp16"  # which CPUs do not compute in
    }
    rt = runtimes["int8"]
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random is the point
    model, _, transform = open_clip.create_model_and_transforms(args.model)
    model.eval()
    images: dict[str, dict] = {}
    for name, size in (("640x480", (640, 480)), ("12 megapixels", (4000, 3000))):
        buffer = io.BytesIO()
        picture(*size).save(buffer, "JPEG", quality=90)
        images[name] = measure_image(rt, model, transform, buffer.getvalue(), args)
    report = {
        "machine": machine(),
        "versions": versions_of("edgeclip", "onnxruntime", "torch", "open_clip_torch", "openvino"),
        "model": args.model,
        "labels": args.labels,
        "repeats": args.repeats,
        "precision": rt.precision,
        "encoders": measure_encoders(runtimes, model, args.repeats),
        "images": images,
    }
    publish(report, render, args.json)


if __name__ == "__main__":
    main()
