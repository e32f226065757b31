"""The command `python -m export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip import storage
from edgeclip.backends.onnx_runtime import import_onnxruntime
from edgeclip.cli.command import run_command
from edgeclip.manifest import PRIOR_GRADIENTS
from edgeclip.precisions import PRECISIONS, REFERENCE
from export import ExportError
from train.models.weight_options import add_weight_options
from train.progress import step

if TYPE_CHECKING:
    from train.data.dataset import DataSet

EPILOG = """examples:
  python -m export ViT-B-32 --pretrained laion2b_s34b_b79k -o bundles/vit-b-32
  python -m export ViT-B-32-quickgelu --pretrained openai -o bundles/openai --template "a photo of a {}."
  python -m export ViT-B-16 --pretrained checkpoints/epoch_32.pt -o bundles/mine
  python -m export ViT-B-16 --pretrained 'last.ckpt#model_ema' --no-quickgelu -o bundles/mine
  python -m export ViT-L-14 --pretrained openai --visual fare_eps_2.pt -o bundles/fare
  python -m export downloads/clip-vit-base-patch32 -o bundles/transformers
  python -m export ViT-B-32 --pretrained openai -o bundles/vit-b-32 --precision fp32 int8 --data cifar10
  python -m export runs/fashion-tga -o bundles/fashion --robustness fashion-tga.json
  python -m export runs/fashion-tga -o bundles/fashion --prior runs/fashion-tga-prior
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Make a bundle that edgeclip runs out of an open_clip model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="name of an open_clip model, or folder of a training run or of transformers' CLIP",
    )
    add_weight_options(parser)
    add("-o", "--out", metavar="BUNDLE", type=Path, required=True, help="directory to write")
    for option, text in (
        ("--template", "prompt with {} for the label; may be given several times"),
        ("--null-template", "prompt whose empty form is the null text (default: the templates)"),
    ):
        add(option, metavar="TEXT", action="append", help=text)
    add("--description", metavar="TEXT", help="what the model is for, in a line")
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=[REFERENCE],
        help="precisions of the encoders: "
        + ", ".join(f"{row.name} for {row.hardware}" for row in PRECISIONS.values())
        + f" (default: {REFERENCE})",
    )
    add(
        "--data",
        metavar="SET",
        help="data set, as for python -m train.evaluate, on whose test images each precision has to "
        "answer as the model does, under attack too",
    )
    add(
        "--robustness",
        metavar="JSON",
        type=Path,
        action="append",
        default=[],
        help="result of python -m train.evaluate on this model, with or without a purification: "
        "what gains by it is recommended; may be given several times",
    )
    add(
        "--prior",
        metavar="RUN_OR_FILE",
        type=Path,
        help="a diffusion prior for --purify diff: run of train.diffusion_prior, or a checkpoint of "
        "dalle2-pytorch",
    )
    add(
        "--prior-gradient",
        choices=PRIOR_GRADIENTS,
        default="exact",
        help="forward: half of the work, by a gradient that is not the exact one (default: exact)",
    )
    add(
        "--fused",
        action="store_true",
        help="write fused.PRECISION.onnx too: image to answer in one graph, for trtexec, OpenVINO and "
        "others (see docs/serving.md)",
    )
    add("--force", action="store_true", help="replace the bundle at -o")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    import_onnxruntime()  # which verifies; better missed now than after the export
    # Imported late: what is wrong with the arguments is said before PyTorch has loaded.
    try:
        with step("loading PyTorch"):
            from export import bundle, fused
            from export.checks import evidence
            from train.models import (
                architectures,
                checkpoints,
                trained_prior,
                weight_files,
                wording,
            )
    except ImportError as err:
        raise ExportError(f"{err}: exporting needs pip install 'edgeclip[export]'") from err
    bundle.check_target(options.out, options.force)  # before minutes of work
    model = Path(options.model)
    folder = [model] if architectures.is_model_folder(model) else []
    weights = [weight_files.split_key(p)[0] for p in (options.pretrained, options.visual) if p]
    files = (*weights, options.prior, *options.robustness)
    storage.check_output(options.out, [*folder, *filter(None, files)])
    data = _load_data(options.data) if options.data else None
    source = checkpoints.load(
        options.model,
        options.pretrained,
        visual=options.visual,
        quick_gelu=options.quickgelu,
    )
    words = wording.wording(source, options.description, options.template, options.null_template)
    prior = options.prior and trained_prior.load_prior(options.prior)
    measured, recommended = evidence.read(
        options.robustness, source, words.templates, prior, options.prior_gradient
    )
    if options.fused:
        fused.check_purifier(recommended)  # before minutes of work
    manifest = bundle.export_bundle(
        source,
        options.out,
        words,
        precisions=list(dict.fromkeys(options.precision)),
        data=data,
        robustness=measured,
        purification=recommended,
        prior=prior,
        prior_gradient=options.prior_gradient,
        fused=options.fused,
        force=options.force,
    )
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {manifest.description}, {size / 1e6:,.1f} MB")
    print("difference from PyTorch, by ONNX Runtime on this CPU:")
    for precision, variant in manifest.precisions.items():
        print(f"  {precision}: one image in {variant.cpu_ms:.3g} ms")
        for name, value in variant.parity.items():
            is_fraction = "cosine" in name or "agreement" in name or "accuracy" in name
            print(f"    {name:24} {value:.7f}" if is_fraction else f"    {name:24} {value:.1e}")
    if options.data is None and set(options.precision) != {REFERENCE}:
        print("whether its answers are the same was not measured: name a data set with --data")
    if manifest.prior is not None:
        for name, value in manifest.prior.parity.items():
            print(
                f"  prior {name:18} {value:.7f}"
                if "cosine" in name
                else f"  prior {name:18} {value:.1e}"
            )
    print(f"use it: edgeclip classify IMAGE --labels FILE --bundle {options.out}")


def _load_data(spec: str) -> DataSet:
    """Before minutes of work. Raises ExportError."""
    try:
        from export.checks import fidelity
    except ImportError as err:
        raise ExportError(f"{err}: --data needs pip install 'edgeclip[train]' too") from err
    return fidelity.load(spec)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
