"""ONNX graphs of a model's image and text encoders, without the exporter's metadata."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from edgeclip.manifest import TokenSpec
from export import ExportError
from export.graphs.save import save
from train.models.self_attention import plain_attention
from train.models.towers import image_encoder
from train.progress import brief, quiet

OPSET = 20  # includes Gelu as one operator; TensorRT 10.3 (JetPack 6) builds it
Shape = tuple[str | int, ...]


class TextEncoder(nn.Module):
    """Text tower of any kind: ids (B, L) -> embedding (B, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        embedding: Tensor = self.model.encode_text(ids, normalize=False)
        return embedding


class CutTextEncoder(nn.Module):
    """Causal text tower for ids (B, L) of any length L up to its context length.

    No token attends to later ones, so ids cut after the end mark give the same embedding. open_clip
    always adds all positions and the whole mask; the call cuts both to L.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = TextEncoder(model)
        self.prefix = "model." if isinstance(model, CLIP) else "model.text."

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        tower: Any = self.encoder.get_submodule(self.prefix.rstrip("."))
        cut = {
            self.prefix + "positional_embedding": tower.positional_embedding[:length],
            self.prefix + "attn_mask": tower.attn_mask[:length, :length],
        }
        embedding: Tensor = torch.func.functional_call(self.encoder, cut, (ids,))
        return embedding


class TransformersTextEncoder(nn.Module):
    """Text tower of transformers for ids (B, L) of any length L, whose mask hides all padding."""

    def __init__(self, text: HFTextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != self.text.config.pad_token_id).long()
        hidden = self.text.transformer(input_ids=ids, attention_mask=mask)
        embedding: Tensor = self.text.proj(self.text.pooler(hidden, mask))
        return embedding


def can_cut(model: Any, pad_id: int) -> bool:
    """Return whether ids may be cut after the longest prompt without changing any embedding.

    pad_id: the tokenizer's padding.
    """
    if isinstance(model, CLIP):
        return model.attn_mask is not None and model.text_pool_type in ("argmax", "eos")
    text = model.text
    if isinstance(text, HFTextEncoder):
        return bool(text.config.pad_token_id == pad_id)
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type in ("argmax", "eos")
    )


def export_image_encoder(model: Any, size: tuple[int, int], path: Path) -> TokenSpec | None:
    """Write pixels ("batch", 3, H, W) -> embedding ("batch", D) [, tokens ("batch", T, D)].

    The bundle has the two outputs in two graphs: see `split_outputs`. Raises ExportError if PyTorch
    cannot export the tower, or fixes its batch size.
    """
    encoder, spec = image_encoder(model)
    example = torch.zeros(2, 3, *size)  # a batch of 1 would become a constant
    names = ["embedding", "tokens"] if spec else ["embedding"]
    dims = ({0: torch.export.Dim("batch")},)
    with plain_attention(encoder):
        export_graph(encoder, (example,), ["pixels"], names, dims, path)
    width = _embed_dim(encoder, example[:1])
    outputs: dict[str, Shape] = {"embedding": ("batch", width)}
    if spec:
        outputs["tokens"] = ("batch", spec.prefix + spec.grid[0] * spec.grid[1], width)
    check_shapes(path, {"pixels": ("batch", 3, *size)}, outputs)
    return spec


def export_text_encoder(model: Any, context_length: int, pad_id: int, path: Path) -> bool:
    """Write ids ("batch", "length") -> embedding ("batch", D); return whether the length is symbolic.

    A tower that is neither causal nor masks its padding keeps the full length. Raises ExportError
    like `export_image_encoder`.
    """
    cut = can_cut(model, pad_id)
    encoder: nn.Module = CutTextEncoder(model) if cut else TextEncoder(model)
    if isinstance(getattr(model, "text", None), HFTextEncoder):
        encoder = TransformersTextEncoder(model.text)
    length = min(8, context_length) if cut else context_length
    example = torch.arange(2 * length).reshape(2, length) % 7 + 1
    dims: dict[int, Any] = {0: torch.export.Dim("batch")}
    if cut:
        dims[1] = torch.export.Dim("length", max=context_length)
    with plain_attention(encoder):
        export_graph(encoder, (example,), ["ids"], ["embedding"], (dims,), path)
    ids: Shape = ("batch", "length" if cut else context_length)
    check_shapes(path, {"ids": ids}, {"embedding": ("batch", _embed_dim(encoder, example))})
    return cut


@torch.no_grad()
def _embed_dim(encoder: nn.Module, example: Tensor) -> int:
    output = encoder(example)
    return int((output if isinstance(output, Tensor) else output[0]).shape[-1])


@torch.no_grad()
def export_graph(
    module: nn.Module,
    example: tuple[Tensor, ...],
    input_names: list[str],
    output_names: list[str],
    dims: tuple[dict[int, Any], ...],
    path: Path,
    rewrite: Callable[[onnx_ir.Model], None] | None = None,
) -> None:
    """Write a module as ONNX. Raises ExportError.

    dims: symbolic sizes of each input. rewrite: replaces the exporter's own optimisation.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                module.eval(),
                example,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dims,
                opset_version=OPSET,
                optimize=rewrite is None,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as err:
        cause: BaseException = err
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"PyTorch cannot export this model to ONNX: {brief(cause)}") from err
    if program is None:
        raise ExportError("PyTorch returned no ONNX model")
    (rewrite or _fold_transposes)(program.model)
    _save(program.model, path)


def _fold_transposes(model: onnx_ir.Model) -> None:
    """Store weights transposed; the exporter keeps the Transpose of weights that are used twice."""
    folded: dict[tuple[str, tuple[int, ...]], onnx_ir.Value] = {}
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer():
            continue
        if weight.name is None or weight.const_value is None:
            raise ExportError("the exported graph has a weight without name or values")
        order = tuple(node.attributes["perm"].as_ints())
        if (weight.name, order) not in folded:
            array = np.ascontiguousarray(weight.const_value.numpy().transpose(order))
            name = f"{weight.name}.transposed{len(folded)}"
            value = onnx_ir.Value(
                name=name,
                shape=onnx_ir.Shape(array.shape),
                type=weight.type,
                const_value=onnx_ir.tensor(array, name=name),
            )
            model.graph.register_initializer(value)
            folded[weight.name, order] = value
        node.outputs[0].replace_all_uses_with(folded[weight.name, order])
        model.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)


def _save(model: onnx_ir.Model, path: Path) -> None:
    _remove_origins(model)
    _rename_clashes(model.graph)
    save(model, path)


def _remove_origins(model: onnx_ir.Model) -> None:
    """Remove the exporter's notes on source code: megabytes, with paths of this machine."""
    model.metadata_props.clear()
    model.doc_string = None
    graph = model.graph
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values += node.outputs
    items: list[onnx_ir.Graph | onnx_ir.Node | onnx_ir.Value] = [graph, *graph.all_nodes(), *values]
    for item in items:
        item.metadata_props.clear()
        item.doc_string = None


def _rename_clashes(graph: onnx_ir.Graph) -> None:
    """Rename inner values that have an output's name, such as the result of aten's embedding."""
    outputs = set(graph.outputs)
    taken = {value.name for value in outputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value not in outputs and value.name in taken:
                value.name = f"inner_{value.name}"


def check_shapes(path: Path, inputs: dict[str, Shape], outputs: dict[str, Shape]) -> None:
    """Raise ExportError unless the file has exactly these inputs and outputs, symbols included."""
    graph = onnx.load(path, load_external_data=False).graph
    for values, expected in ((graph.input, inputs), (graph.output, outputs)):
        actual = {value.name: _shape(value) for value in values}
        if actual != expected:
            raise ExportError(f"the exported graph has the shapes {actual}, not {expected}")


def _shape(value: onnx.ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_param if dim.HasField("dim_param") else dim.dim_value for dim in dims)
