"""Latency of one image, end to end and stage by stage, against open_clip with CLIPure-Cos.

Both sides purify with the published setting, take turns in one process, and use all cores. The weights
are random, which does not change the time. The peer is the paper's setting in PyTorch: decoding by
Pillow, open_clip's transform, the eager float32 encoder, ten steps of gradient ascent on the cosine by
autograd, and the logits. The encoders are also compared with OpenVINO on the same ONNX file, if it is
installed. The limit is the encoder's floating-point operations at the rate of a large float32 matrix
product in the same run.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image

import edgeclip
from benchmarks.common import (
    MATRIX,
    STEP_SIZE,
    STEPS,
    Report,
    add_model,
    add_repeats,
    build_parser,
    bundle_for,
    cpu_precisions,
    encoder_flops,
    label_set,
    published_loop,
    published_purification,
    versions_of,
)
from benchmarks.timing import machine, medians_ms, publish
from edgeclip import _core
from edgeclip.cli.command import run_command
from edgeclip.images.decoding import decode
from edgeclip.tools.pictures import picture

EPILOG = """examples:
  python -m benchmarks.latency
  python -m benchmarks.latency --model ViT-L-14 --repeats 10 --json latency.json
"""


def openvino_encoders(path: Path, pixels: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return calls of OpenVINO on the same graph, tuned for latency; none if it is not installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    graph = core.read_model(path)
    graph.reshape(pixels.shape)
    calls: dict[str, Callable[[], object]] = {}
    for name, precision in (("fp32", "f32"), ("bf16", "bf16")):
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(graph, "CPU", options).create_infer_request()
        calls[f"OpenVINO {name}"] = partial(request.infer, {0: pixels})
    return calls


def measure_encoders(runtimes: dict[str, Any], model: Any, repeats: int) -> dict[str, Any]:
    """Return the milliseconds of one image through each encoder, and the limit."""
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
    calls: dict[str, Callable[[], object]] = {
        f"edgeclip {name}": partial(rt.encode, pixels) for name, rt in runtimes.items()
    }
    calls |= {"open_clip fp32": eager, "open_clip bf16": autocast}
    calls |= openvino_encoders(first.bundle.encoder("image_encoder", "fp32"), pixels)
    ms = medians_ms(calls | {"product": lambda: torch.mm(a, b)}, repeats)
    flops = encoder_flops(model)
    return {
        "limit_fp32": ms.pop("product") * flops / (2 * MATRIX**3),
        "ms": ms,
        "gflop": flops / 1e9,
    }


def measure_image(
    rt: edgeclip.Runtime, model: Any, transform: Any, jpeg: bytes, args: Any
) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each side for one JPEG, by stage and end to end."""
    null_text = torch.from_numpy(rt.bundle.null_text.copy())
    labels = label_set(rt, args.labels)
    weights = torch.from_numpy(labels.embeddings.copy())
    scale = model.logit_scale.exp()

    def peer_classify(z: torch.Tensor) -> object:
        logits = scale * published_loop(z, null_text) @ weights.T
        return logits.detach().softmax(1).topk(5)

    def peer() -> object:
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
    purification = published_purification(rt.bundle.null_text, labels.null_scores)

    def peer_encode() -> object:
        with torch.no_grad():
            return model.encode_image(tensor)

    stages: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "decode": (
            lambda: decode(jpeg, fast_for=rt.bundle.manifest.image),
            lambda: Image.open(io.BytesIO(jpeg)).convert("RGB"),
        ),
        "preprocess": (lambda: rt.preprocess([decoded]), lambda: transform(image)),
        "encoder": (lambda: rt.encode(pixels), peer_encode),
        "classify": (
            lambda: _core.classify(embedding, labels.embeddings, logit_scale=100.0, **purification),
            lambda: peer_classify(z),
        ),
        "end to end": (lambda: rt.classify(jpeg, labels), peer),
    }
    return {
        stage: medians_ms({"edgeclip": ours, "open_clip": theirs}, args.repeats)
        for stage, (ours, theirs) in stages.items()
    }


def render(report: Report) -> str:
    """Return the report as Markdown."""
    encoders = report["encoders"]
    peer = encoders["ms"]["open_clip fp32"]
    lines = [
        "| encoder, one image | ms | open_clip fp32 / it | of the fp32 limit |",
        "|---|---|---|---|",
    ]
    for name, ms in encoders["ms"].items():
        share = encoders["limit_fp32"] / ms
        lines.append(f"| {name} | {ms:.1f} | {peer / ms:.2f} | {share:.0%} |")
    lines += [
        "",
        (
            f"{encoders['gflop']:.2f} GFLOP, at the rate of a large float32 product "
            f"{encoders['limit_fp32']:.1f} ms; int8 and bf16 may go below that."
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
    """Run the benchmark."""
    parser = build_parser(__doc__, EPILOG)
    add_model(parser)
    parser.add_argument(
        "--labels", type=int, default=1000, help="number of classes (default: 1000)"
    )
    add_repeats(parser, 40)
    args = parser.parse_args()

    bundle = edgeclip.Bundle(bundle_for(args.model))
    purifier = edgeclip.CosPurifier(STEPS, STEP_SIZE)
    runtimes = {
        name: edgeclip.Runtime(bundle, precision=name, purify=purifier)
        for name in cpu_precisions(bundle)
    }
    rt = runtimes["int8"]
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    model, _, transform = open_clip.create_model_and_transforms(args.model)
    model.eval()
    images: dict[str, dict[str, dict[str, float]]] = {}
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
    sys.exit(run_command(main))
