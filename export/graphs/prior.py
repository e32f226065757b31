"""ONNX graph of a diffusion prior's step: its loss and the gradient for the image embedding.

The backward pass is traced into the graph. PyTorch is compared with ONNX Runtime on random inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from edgeclip.manifest import PRIOR_GRADIENTS, PriorSpec
from edgeclip.purify import DiffPurifier
from export import ExportError
from export.graphs.encoders import Shape, check_shapes, export_graph
from train.models.checkpoints import Source
from train.models.prior import Context, DiffusionPrior
from train.models.trained_prior import TrainedPrior, null_context
from train.progress import step

PRIOR_FILE = "prior.onnx"  # in a bundle
TEXT_INPUTS = ("text_embed", "text_encodings", "text_mask")
LIMIT = 1e-4  # difference of losses and gradients, relative to PyTorch's
PROBES = ((1, 901), (2, 950), (33, 999))  # batch sizes and timesteps to compare
DECOMPOSED = (  # the ONNX exporter has no function for these
    "native_layer_norm_backward",
    "_softmax_backward_data",
    "select_backward",
    "silu_backward",
    "slice_backward",
)


class Step(nn.Module):
    """Module from z (N, D), timestep (N,), noise (N, D) [, text] to loss (N,), gradient (N, D).

    context: the text, or None if the text is an input. gradient: "exact" or "forward".
    """

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
    """Write the step to `path`; without a context, a text of text_length tokens is an input.

    Raises ExportError if PyTorch cannot export it.
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
    operators = [getattr(torch.ops.aten, name) for name in DECOMPOSED]
    table: dict[Any, Callable[..., Any]] = torch._decomp.get_decompositions(operators)
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
    """Apply the optimisations that ONNX Runtime does not make at load.

    The exporter's own optimiser takes time that grows with the square of the graph: half an hour
    for a prior of 24 layers.
    """
    _single_norms(model)
    _share_weights(model)
    fold_constants(model)
    DeduplicateInitializersPass()(model)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)


def _single_norms(model: onnx_ir.Model) -> None:
    """Compute each layer norm's mean and inverse deviation, for the backward pass, separately.

    TensorRT takes no LayerNormalization with more than one output.
    """
    for node in list(model.graph):
        if node.op_type != "LayerNormalization" or len(node.outputs) == 1:
            continue
        tape, x, (_, mean, inverse) = Tape(), node.inputs[0], node.outputs
        value = np.array(node.attributes["epsilon"].as_float(), np.float32)
        epsilon = tape.initializer(onnx_ir.tensor(value), f"{mean.name}.epsilon")
        axes = tape.initializer(onnx_ir.tensor(np.array([-1])), f"{mean.name}.axes")
        average = tape.op("ReduceMean", [x, axes])
        centred = tape.op("Sub", [x, average])
        variance = tape.op("ReduceMean", [tape.op("Mul", [centred, centred]), axes])
        deviation = tape.op("Sqrt", [tape.op("Add", [variance, epsilon])])
        mean.replace_all_uses_with(average)
        inverse.replace_all_uses_with(tape.op("Reciprocal", [deviation]))
        for constant in tape.initializers:
            model.graph.register_initializer(constant)
        model.graph.insert_before(node, tape.nodes)
        node.resize_outputs(1)


def _share_weights(model: onnx_ir.Model) -> None:
    """Let forward and backward products share each stored weight, transposed or not."""
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        weight, transposed = node.inputs[1], False
        while weight is not None and (producer := weight.producer()) is not None:
            if producer.op_type != "Transpose":
                break
            weight, transposed = producer.inputs[0], not transposed
        if weight is None or not weight.is_initializer():
            continue
        node.replace_input_with(1, weight)
        if transposed:
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
    """Compare the file, run by ONNX Runtime, with PyTorch, and return the parity.

    The parity is the largest relative difference of loss and gradient, and the smallest cosine
    between a forward gradient and the exact one. Raises ExportError if a difference is above LIMIT.
    """
    session = open_session(path, "cpu")
    text = () if context is not None else _example_text(prior, text_length)
    names = INPUTS + (TEXT_INPUTS if text else ())
    largest = {"loss": 0.0, "gradient": 0.0}
    cosines = []
    for count, timestep in PROBES:
        example = _example(prior, count, timestep) + text
        expected = Step(prior, context, gradient)(*example)
        inputs = {name: value.numpy() for name, value in zip(names, example, strict=True)}
        outputs = session.run(None, inputs)
        for name, actual, reference in zip(OUTPUTS, outputs, expected, strict=True):
            error = np.linalg.norm(actual - reference.numpy()) / reference.norm().item()
            largest[name] = float(np.maximum(largest[name], error))  # keeps a NaN
        exact, forward = (Step(prior, context, kind)(*example)[1] for kind in PRIOR_GRADIENTS)
        cosines.append(F.cosine_similarity(exact, forward).min().item())
    for name, error in largest.items():
        if not error <= LIMIT:
            raise ExportError(
                f"the exported prior does not match PyTorch: its {name} has a relative difference "
                f"of {error:.3g} (limit {LIMIT:g})"
            )
    parity = {f"{name}_max_rel_diff": error for name, error in largest.items()}
    return parity | {"forward_min_cosine": min(cosines)}


def write_prior(
    folder: Path, prior: TrainedPrior, source: Source, null_templates: Sequence[str], gradient: str
) -> PriorSpec:
    """Write and verify a bundle's prior.onnx, and add PyTorch's gradient to its golden values.

    Raises ExportError, or ModelError if the prior does not fit the model.
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
