"""A diffusion prior as an ONNX graph: the step of CLIPure-Diff, for a device without PyTorch.

    python -m export.diffusion_prior runs/prior -o prior.onnx

The graph evaluates the prior's loss (train.prior_network) and its gradient with respect to the image
embedding; the backward pass is traced into it. In a bundle, made by `python -m export --prior`, the
text is always the null text: what it leaves for the other tokens is then a constant of the graph,
and three tokens are left to be computed rather than eighty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
)
from onnx_ir.tape import Tape
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from edgeclip.backends.onnx_runtime import open_session
from edgeclip.backends.prior import INPUTS, OUTPUTS
from edgeclip.bundle import GOLDEN
from edgeclip.errors import EdgeclipError
from edgeclip.manifest import PRIOR_GRADIENTS, PriorSpec
from edgeclip.purify import DiffPurifier
from edgeclip.storage import sha256
from export import ExportError
from export.checkpoints import Source
from export.files import check_graph_target, graph_draft
from export.progress import step
from export.to_onnx import Shape, check_shapes, export_graph
from export.weight_files import read_file
from train.prior_network import Context, DiffusionPrior

PRIOR_FILE = "prior.onnx"  # of a bundle
WEIGHTS = "prior.safetensors"  # of a run
TEXT_INPUTS = ("text_embed", "text_encodings", "text_mask")
LIMIT = 1e-4  # of losses and gradients, relative to PyTorch's
PROBES = ((1, 901), (2, 950), (33, 999))  # batch and timestep that are compared
DECOMPOSED = (  # what the ONNX exporter has no function for
    "native_layer_norm_backward",
    "_softmax_backward_data",
    "select_backward",
    "silu_backward",
    "slice_backward",
)
EPILOG = """examples:
  python -m export.diffusion_prior runs/prior -o prior.onnx
  python -m export.diffusion_prior best.pth -o prior.onnx --gradient forward --text-length 77

inputs: z (N, D) unit embeddings, timestep (N,) int64, noise (N, D); text_embed (1, D),
text_encodings (1, L, D), text_mask (1, L) bool: one text for all. outputs: loss (N,), gradient (N, D)
of the loss with respect to z. --gradient forward leaves out what the prediction itself depends on:
half of the work, and another direction, whose cosine to the exact one is printed.
"""


@dataclass(frozen=True)
class TrainedPrior:
    """A prior in PyTorch, and where it came from."""

    model: DiffusionPrior
    weights_sha256: str


def load_prior(path: Path) -> TrainedPrior:
    """A run of train.diffusion_prior, a safetensors file, or a checkpoint of dalle2-pytorch.

    No code in a file is run. Raises ExportError.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ExportError(f"{file} does not exist: name a run of train.diffusion_prior, or a file")
    state = read_file(file)
    if not isinstance(state, Mapping):
        raise ExportError(f"{file} holds no state dict")
    try:
        model = DiffusionPrior.from_state_dict(state)
    except ExportError as err:
        raise ExportError(f"{file}: {err}") from err
    return TrainedPrior(model, sha256(file))


@torch.no_grad()
def text_tokens(source: Source, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Unit text embeddings (P, D), and the text tower's tokens (P, L, width) after its last norm,
    zero behind the end of each prompt where the tower reads that end.

    Raises ExportError for a tower without such tokens.
    """
    tower = getattr(source.model, "text", source.model)
    if not hasattr(tower, "ln_final") or getattr(tower, "cls_emb", None) is not None:
        raise ExportError(f"the text tower of {source.name} gives a prior no tokens")
    found: list[Tensor] = []
    handle = tower.ln_final.register_forward_hook(lambda *args: found.append(args[2]))
    ids = source.tokenizer(list(prompts))
    try:
        embeddings = source.model.encode_text(ids, normalize=True)
    finally:
        handle.remove()
    inside = torch.ones_like(ids, dtype=torch.bool)
    if getattr(tower, "pool_type", getattr(source.model, "text_pool_type", "")) in (
        "argmax",
        "eos",
    ):
        inside = torch.arange(ids.shape[1]) <= ids.argmax(1)[:, None]  # the end mark is the highest
    return embeddings, found[0] * inside[:, :, None]


def null_context(prior: DiffusionPrior, source: Source, templates: Sequence[str]) -> Context:
    """What "no class in particular" leaves for the prior: the null text, and the tokens of its first
    template. Raises ExportError where the prior is not made for this CLIP."""
    embeddings, tokens = text_tokens(source, [text.replace("{}", "") for text in templates])
    if prior.shape.dim != embeddings.shape[1] or prior.shape.dim != tokens.shape[2]:
        raise ExportError(
            f"the prior is made for embeddings and text tokens of {prior.shape.dim} values, those of "
            f"{source.name} have {embeddings.shape[1]} and {tokens.shape[2]}"
        )
    with torch.no_grad():
        return prior.context(F.normalize(embeddings.mean(0, keepdim=True), dim=1), tokens[:1])


class Step(nn.Module):
    """z (N, D), timestep (N,), noise (N, D) [, texts] -> loss (N,), its gradient (N, D)."""

    def __init__(self, prior: DiffusionPrior, context: Context | None, gradient: str) -> None:
        super().__init__()
        self.prior, self.context, self.exact = prior, context, gradient == "exact"

    def forward(
        self, z: Tensor, timestep: Tensor, noise: Tensor, *text: Tensor
    ) -> tuple[Tensor, Tensor]:
        context = self.context
        if context is None:
            embed, encodings, mask = text
            context = self.prior.context(embed, encodings, text_mask=mask)
        return self.prior.score(z, timestep, noise, context, exact=self.exact)


def export_step(
    prior: DiffusionPrior, path: Path, context: Context | None, gradient: str, text_length: int = 0
) -> None:
    """Write the step; without a context the text is an input, of text_length tokens.

    Raises ExportError where PyTorch cannot export it.
    """
    dim = prior.shape.dim
    example = _example(prior, 3)
    shapes: dict[str, Shape] = {
        "z": ("batch", dim),
        "timestep": ("batch",),
        "noise": ("batch", dim),
    }
    if context is None:
        example += _example_text(prior, text_length)
        shapes |= dict(
            zip(TEXT_INPUTS, ((1, dim), (1, text_length, dim), (1, text_length)), strict=True)
        )
    table = torch._decomp.get_decompositions([getattr(torch.ops.aten, x) for x in DECOMPOSED])
    graph = make_fx(
        Step(prior, context, gradient).forward,
        decomposition_table=table,
        tracing_mode="symbolic",
        _allow_non_fake_inputs=True,
    )(*example)
    batch = torch.export.Dim("batch")
    dims = tuple({0: batch} if shapes[name][0] == "batch" else {} for name in shapes)
    export_graph(graph, example, list(shapes), list(OUTPUTS), dims, path, _optimize)
    check_shapes(path, shapes, {"loss": ("batch",), "gradient": ("batch", dim)})


def _optimize(model: onnx_ir.Model) -> None:
    """What ONNX Runtime does not do at load; the exporter's own optimiser takes time that grows with
    the square of the graph, half an hour for a prior of 24 layers."""
    _single_norms(model)
    _share_weights(model)
    fold_constants(model)
    for clean in (
        DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    ):
        clean(model)


def _single_norms(model: onnx_ir.Model) -> None:
    """Compute what the backward pass needs of a layer norm, its mean and 1 / its deviation, beside it:
    TensorRT takes no LayerNormalization of more than one output."""
    for node in list(model.graph):
        if node.op_type != "LayerNormalization" or len(node.outputs) == 1:
            continue
        tape, x, (_, mean, inverse) = Tape(), node.inputs[0], node.outputs
        small = np.array(node.attributes["epsilon"].as_float(), np.float32)
        epsilon = tape.initializer(onnx_ir.tensor(small), f"{mean.name}.epsilon")
        axes = tape.initializer(onnx_ir.tensor(np.array([-1])), f"{mean.name}.axes")
        average = tape.op("ReduceMean", [x, axes])
        centred = tape.op("Sub", [x, average])
        variance = tape.op("ReduceMean", [tape.op("Mul", [centred, centred]), axes])
        deviation = tape.op("Sqrt", [tape.op("Add", [variance, epsilon])])
        mean.replace_all_uses_with(average)
        inverse.replace_all_uses_with(tape.op("Reciprocal", [deviation]))
        for value in tape.initializers:
            model.graph.register_initializer(value)
        model.graph.insert_before(node, tape.nodes)
        node.resize_outputs(1)


def _share_weights(model: onnx_ir.Model) -> None:
    """Let products use each weight as it is stored: its transpose, which one of forward and backward
    pass needs, would otherwise be stored beside it."""
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        weight = node.inputs[1]
        turned = False
        while (maker := weight.producer()) is not None and maker.op_type == "Transpose":
            weight, turned = maker.inputs[0], not turned
        if not weight.is_initializer():
            continue
        node.replace_input_with(1, weight)
        if turned:
            node.op_type = "Gemm"
            node.attributes["transB"] = onnx_ir.AttrInt64("transB", 1)


def _example(prior: DiffusionPrior, count: int, timestep: int = 950) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(count)
    z, noise = torch.randn(2, count, prior.shape.dim, generator=random)
    times = torch.full((count,), min(timestep, prior.shape.timesteps - 1))
    return F.normalize(z, dim=1), times, noise


def _example_text(prior: DiffusionPrior, length: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    text = torch.randn(1, length + 1, prior.shape.dim, generator=random)
    mask = torch.arange(length)[None] < max(1, length // 2)
    return F.normalize(text[:, 0], dim=1), text[:, 1:], mask


def verify_step(
    prior: DiffusionPrior, path: Path, context: Context | None, gradient: str, text_length: int = 0
) -> dict[str, float]:
    """Differences of the file, run by ONNX Runtime, from PyTorch, relative to its values; and how
    far a gradient without the prediction's own would be from the exact one, as a cosine.

    Raises ExportError where a difference is above its limit.
    """
    session = open_session(path, "cpu")
    text = () if context is not None else _example_text(prior, text_length)
    names = INPUTS + (TEXT_INPUTS if text else ())
    worst = {"loss": 0.0, "gradient": 0.0}
    cosines = []
    for count, timestep in PROBES:
        example = _example(prior, count, timestep) + text
        wanted = Step(prior, context, gradient)(*example)
        given = {name: value.numpy() for name, value in zip(names, example, strict=True)}
        for name, found, expected in zip(OUTPUTS, session.run(None, given), wanted, strict=True):
            error = np.linalg.norm(found - expected.numpy()) / expected.norm().item()
            worst[name] = float(np.maximum(worst[name], error))  # keeps a NaN
        pair = [Step(prior, context, kind)(*example)[1] for kind in PRIOR_GRADIENTS]
        cosines.append(F.cosine_similarity(*pair).min().item())
    for name, error in worst.items():
        if not error <= LIMIT:
            raise ExportError(
                f"the exported prior is not PyTorch's: its {name} differs by {error:.3g} of it "
                f"(limit {LIMIT:g})"
            )
    found = {f"{name}_max_rel_diff": error for name, error in worst.items()}
    return found | {"forward_min_cosine": min(cosines)}


def write_prior(
    folder: Path, prior: TrainedPrior, source: Source, null_templates: Sequence[str], gradient: str
) -> PriorSpec:
    """Write and check a bundle's prior.onnx, and add PyTorch's to its golden values.

    Raises ExportError.
    """
    path = folder / PRIOR_FILE
    context = null_context(prior.model, source, null_templates)
    with step("exporting the diffusion prior"):
        export_step(prior.model, path, context, gradient)
    with step("comparing the prior with PyTorch"):
        parity = verify_step(prior.model, path, context, gradient)
    timesteps = prior.model.shape.timesteps
    with np.load(folder / GOLDEN) as arrays:
        golden = dict(arrays)
    z, times = torch.from_numpy(golden["embedding"])[None], torch.tensor([timesteps // 2])
    noise = torch.from_numpy(DiffPurifier(steps=1).draws(z.shape[1])[1])
    golden["prior_gradient"] = Step(prior.model, context, gradient)(z, times, noise)[1][0].numpy()
    np.savez(folder / GOLDEN, **golden)
    return PriorSpec(PRIOR_FILE, prior.weights_sha256, timesteps, gradient, parity)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 2 after one line that says what to change."""
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
    options = parser.parse_args(arguments)
    try:
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
    except (EdgeclipError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    for name, value in parity.items():
        print(f"  {name:24} {value:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
