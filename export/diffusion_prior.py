"""Export of a diffusion prior: the step of CLIPure-Diff as an ONNX graph.

    python -m export.diffusion_prior runs/prior -o prior.onnx

The graph evaluates the prior's loss (train.models.prior) and its gradient for the image embedding;
the backward pass is traced into it. In a bundle (`python -m export --prior`) the text is always the
null text: its keys and values are constants of the graph, so that a step computes three tokens
instead of eighty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgeclip.cli.command import run_command
from edgeclip.manifest import PRIOR_GRADIENTS
from export import ExportError
from export.graphs.prior import export_step, verify_step
from export.output import check_graph_target, staged_graph
from train.models.trained_prior import WEIGHTS, load_prior
from train.progress import step

EPILOG = """examples:
  python -m export.diffusion_prior runs/prior -o prior.onnx
  python -m export.diffusion_prior best.pth -o prior.onnx --gradient forward --text-length 77

inputs: z (N, D) unit embeddings, timestep (N,) int64, noise (N, D); text_embed (1, D),
text_encodings (1, L, D), text_mask (1, L) bool: one text for all. outputs: loss (N,), and its
gradient (N, D) for z. --gradient forward treats the prediction as a constant: half of the work, and
another direction, whose cosine to the exact one is printed.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.diffusion_prior",
        description="Write the step of CLIPure-Diff as an ONNX graph with the text as an input.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "prior",
        metavar="PRIOR",
        type=Path,
        help="folder of a training run, safetensors file or dalle2-pytorch checkpoint",
    )
    add("-o", "--out", metavar="ONNX", type=Path, required=True, help="graph to write")
    add("--force", action="store_true", help="replace an existing file at -o")
    add(
        "--gradient",
        choices=PRIOR_GRADIENTS,
        default="exact",
        help="gradient of the loss (default: exact)",
    )
    add(
        "--text-length",
        type=int,
        default=77,
        metavar="L",
        help="number of text tokens (default: 77)",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Write the graph, and print its differences from PyTorch. Raises EdgeclipError."""
    if options.text_length < 1:
        raise ExportError(f"--text-length must be 1 or more, got {options.text_length}")
    weights = [options.prior, options.prior / WEIGHTS]
    check_graph_target(options.out, options.force, weights)
    prior = load_prior(options.prior).model
    with staged_graph(options.out) as path:
        settings = path, None, options.gradient, options.text_length
        with step("exporting the step"):
            export_step(prior, *settings)
        with step("comparing the step with PyTorch"):
            parity = verify_step(prior, *settings)
    for name, value in parity.items():
        print(f"  {name:24} {value:.3g}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
