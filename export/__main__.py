"""Command `python -m export`: a model from PyTorch becomes a bundle."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeclip import storage
from edgeclip.backends.onnx_runtime import import_onnxruntime
from edgeclip.cli.command import run_command
from edgeclip.manifest import PRIOR_GRADIENTS, Manifest
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
        description="Export an open_clip model as a bundle that edgeclip runs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="name of an open_clip model, or folder of a training run or of a transformers CLIP model",
    )
    add_weight_options(parser)
    add("-o", "--out", metavar="BUNDLE", type=Path, required=True, help="bundle directory to write")
    for option, text in (
        ("--template", "prompt with {} for the label; repeatable"),
        (
            "--null-template",
            "prompt whose empty form is the null text (default: the templates); repeatable",
        ),
    ):
        add(option, metavar="TEXT", action="append", help=text)
    add("--description", metavar="TEXT", help="one-line description of the model")
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=[REFERENCE],
        help="one or more precisions of the encoders: "
        + ", ".join(f"{row.name} for {row.hardware}" for row in PRECISIONS.values())
        + f" (default: {REFERENCE})",
    )
    add(
        "--data",
        metavar="SET",
        help="data set, named as for python -m train.evaluate, on whose test images each precision "
        "must answer as the original model does, clean and under attack",
    )
    add(
        "--robustness",
        metavar="JSON",
        type=Path,
        action="append",
        default=[],
        help="result file of python -m train.evaluate on this model, with or without purification; "
        "the bundle recommends the purification with the largest significant gain; repeatable",
    )
    add(
        "--prior",
        metavar="RUN_OR_FILE",
        type=Path,
        help="diffusion prior for --purify diff: run of train.diffusion_prior, or dalle2-pytorch "
        "checkpoint",
    )
    add(
        "--prior-gradient",
        choices=PRIOR_GRADIENTS,
        default="exact",
        help="gradient of the prior's loss; forward is approximate, for half of the work (default: "
        "exact)",
    )
    add(
        "--fused",
        action="store_true",
        help="also write fused.PRECISION.onnx, one graph from image to answer for trtexec, OpenVINO "
        "and others (docs/serving.md)",
    )
    add("--force", action="store_true", help="replace an existing bundle at -o")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Export the model that the options name, and print a report. Raises EdgeclipError."""
    import_onnxruntime()  # fail now rather than at verification
    # Imported late: wrong arguments are reported before PyTorch has loaded.
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
    # All inputs are checked before minutes of work.
    bundle.check_target(options.out, options.force)
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
    prior = trained_prior.load_prior(options.prior) if options.prior else None
    measured, recommended = evidence.read(
        options.robustness, source, words.templates, prior, options.prior_gradient
    )
    if options.fused:
        fused.check_purifier(recommended)
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
    _print_report(options.out, manifest, compared=data is not None)


def _load_data(spec: str) -> DataSet:
    try:
        from export.checks import fidelity
    except ImportError as err:
        raise ExportError(f"{err}: --data also needs pip install 'edgeclip[train]'") from err
    return fidelity.load(spec)


def _print_report(out: Path, manifest: Manifest, compared: bool) -> None:
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {manifest.description}, {size / 1e6:,.1f} MB")
    print("difference from PyTorch, by ONNX Runtime on this CPU:")
    for precision, variant in manifest.precisions.items():
        print(f"  {precision}: one image in {variant.cpu_ms:.3g} ms")
        for name, value in variant.parity.items():
            print(f"    {name:24} {_format(name, value)}")
    if not compared and set(manifest.precisions) != {REFERENCE}:
        print("answers were not compared with the original model's: name a data set with --data")
    if manifest.prior is not None:
        for name, value in manifest.prior.parity.items():
            print(f"  prior {name:18} {_format(name, value)}")
    print(f"try it: edgeclip classify IMAGE --labels FILE --bundle {out}")


def _format(name: str, value: float) -> str:
    is_fraction = any(word in name for word in ("cosine", "agreement", "accuracy"))
    return f"{value:.7f}" if is_fraction else f"{value:.1e}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
