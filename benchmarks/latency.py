"""Latency of one image, end to end and stage by stage, against open_clip with CLIPure-Cos.

Both sides purify with the published setting, run in this process in turn, and use all cores. The
weights are random, which does not change the time. The peer is what the paper's setting means in
PyTorch: Pillow decode, open_clip's transform, the eager float32 encoder, ten steps of gradient
ascent on the cosine with autograd, and the logits.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

import edgeclip
from benchmarks.timing import machine, medians_ms, process
from edgeclip import _core
from edgeclip.images import decode

EPILOG = """examples:
  python -m benchmarks.latency
  python -m benchmarks.latency --model ViT-L-14 --repeats 10 --json latency.json
"""
STEPS, STEP_SIZE = 10, 30.0
EXAMPLE = ["examples/ankle-boot.png", "--labels", "examples/labels.txt"]


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


def picture(width: int, height: int) -> Image.Image:
    """A picture with the detail of a photograph: smooth shapes and some noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-8, 9, smooth.shape, np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def bundle_for(model: str) -> Path:
    """A bundle of the model with random weights, exported anew into build/benchmarks."""
    folder = Path("build/benchmarks") / model
    command = [sys.executable, "-m", "export", model, "--pretrained", "random", "-o"]
    subprocess.run([*command, str(folder), "--force"], check=True, stdout=subprocess.DEVNULL)
    return folder


def measure_image(rt: edgeclip.Runtime, model: Any, transform: Any, jpeg: bytes, args: Any) -> dict:
    """Stage by stage and end to end for one JPEG: {stage: {"edgeclip": ms, "open_clip": ms}}."""
    null_text = torch.from_numpy(rt.bundle.null_text.copy())
    rng = np.random.default_rng(0)
    classes = rng.standard_normal((args.labels, len(null_text)), np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    label_set = edgeclip.LabelSet(
        tuple(map(str, range(args.labels))),
        classes,
        classes @ rt.bundle.null_text,
        rt.text_identity(),
    )
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


def measure_start(repeats: int) -> dict:
    """The embedded bundle as a whole process, against importing open_clip."""
    ours = process([sys.executable, "-m", "edgeclip", "classify", *EXAMPLE], repeats)
    theirs = process([sys.executable, "-c", "import open_clip"], repeats)
    return {"edgeclip": ours, "open_clip": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32", help="of open_clip, with random weights")
    parser.add_argument("--labels", type=int, default=1000, help="classes (default: 1000)")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()

    rt = edgeclip.Runtime(bundle_for(args.model), purify=edgeclip.CosPurifier(STEPS, STEP_SIZE))
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # that the weights are random is the point
    model, _, transform = open_clip.create_model_and_transforms(args.model)
    model.eval()
    images: dict[str, dict] = {}
    for name, size in (("640x480", (640, 480)), ("12 megapixels", (4000, 3000))):
        buffer = io.BytesIO()
        picture(*size).save(buffer, "JPEG", quality=90)
        images[name] = measure_image(rt, model, transform, buffer.getvalue(), args)
    start = measure_start(max(3, args.repeats // 4))

    versions = {p: version(p) for p in ("edgeclip", "onnxruntime", "torch", "open_clip_torch")}
    print(f"{args.model}, {args.labels} labels, CLIPure-Cos {STEPS} x {STEP_SIZE:g}; {machine()}")
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    print("\n| JPEG | stage | edgeclip ms | open_clip ms | ratio |\n|---|---|---|---|---|")
    for name, stages in images.items():
        for stage, ms in stages.items():
            ours, theirs = ms["edgeclip"], ms["open_clip"]
            print(f"| {name} | {stage} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} |")
    print("\n| process | time, ms | peak memory, MB |\n|---|---|---|")
    names = {"edgeclip": "edgeclip classify, embedded bundle", "open_clip": "import open_clip"}
    for side, (ms_, mb) in start.items():
        print(f"| {names[side]} | {ms_:.0f} | {mb:.0f} |")
    print(f"| ratio | {start['open_clip'][0] / start['edgeclip'][0]:.1f} | |")
    if args.json:
        report = {"machine": machine(), "versions": versions, "model": args.model}
        report |= {"labels": args.labels, "repeats": args.repeats, "images": images}
        report["process"] = {k: {"ms": v[0], "mb": v[1]} for k, v in start.items()}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
