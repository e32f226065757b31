"""A diffusion prior as an ONNX graph: the step of CLIPure-Diff, for a device without PyTorch.

    python -m export.diffusion_prior runs/prior -o prior.onnx

The graph evaluates the prior's loss (train.models.prior) and its gradient with respect to the image
embedding; the backward pass is traced into it. In a bundle, made by `python -m export --prior`, the
text is always the null text: what it leaves for the other tokens is then a constant of the graph,
and three tokens are left to be computed rather than eighty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgeclip.cli.command import run_command
from edgeclip.manifest import PRIOR_GRADIENTS
from export import ExportError
from export.graphs.prior import export_step, verify_step
from export.output import check_graph_target, graph_draft
from train.models.trained_prior import WEIGHTS, load_prior
from train.progress import step

EPILOG = """examples:
  python -m export.diffusion_prior runs/prior -o prior.onnx
  python -m export.diffusion_prior best.pth -o prior.onnx --gradient forward --text-length 77

inputs: z (N, D) unit embeddings, timestep (N,) int64, noise (N, D); text_embed (1, D),
text_encodings (1, L, D), text_mask (1, L) bool: one text for all. outputs: loss (N,), gradient (N, D)
of the loss with respect to z. --gradient forward leaves out what the prediction itself depends on:
half of the work, and another direction, whose cosine to the exact one is printed.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m export.diffusion_prior",
        description="Write the step of CLIPure-Diff as an ONNX graph with its text as an input.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prior", metavar="PRIOR", type=Path, help="run, safetensors or dalle2-pytorch checkpoint")
    add("-o", "--out", metavar="ONNX", type=Path, required=True, help="file to write")
    add("--force", action="store_true", help="replace the file at -o")
    add("--gradient", choices=PRIOR_GRADIENTS, default="exact", help="default: exact")
    add("--text-length", type=int, default=77, metavar="L", help="tokens of the text (77)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Write the graph and print how far it is from PyTorch. Raises EdgeclipError."""
    if options.text_length < 1:
        raise ExportError(f"--text-length must be 1 or more, got {options.text_length}")
    weights = [options.prior, options.prior / WEIGHTS]
    check_graph_target(options.out, options.force, weights)
    prior = load_prior(options.prior).model
    with graph_draft(options.out) as path:
        case = path, None, options.gradient, options.text_length
        with step("exporting the step"):
            export_step(prior, *case)
        with step("comparing it with PyTorch"):
            parity = verify_step(prior, *case)
    for name, value in parity.items():
        print(f"  {name:24} {value:.3g}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    return run_command(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())
