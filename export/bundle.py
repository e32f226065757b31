"""A model in PyTorch written as a bundle: complete and verified, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save

from edgeclip import Runtime
from edgeclip.backends.base import EMBEDDING, TOKENS
from edgeclip.bundle import EMBEDDINGS, GOLDEN, MANIFEST, TOKENIZER, Bundle
from edgeclip.manifest import (
    ImageSpec,
    Manifest,
    Robustness,
    TextSpec,
    Variant,
)
from edgeclip.precisions import PRECISIONS, REFERENCE
from edgeclip.purify import Purifier
from export import ExportError, output
from export.checks.parity import cpu_ms, verify
from export.fused import check_purifier, write_fused
from export.golden import golden
from export.graphs import encoders
from export.graphs.fused import Head
from export.graphs.precisions import convert_encoders, pictures
from export.graphs.prior import write_prior
from export.graphs.save import split_outputs
from export.output import move, workshop
from export.tokenizer import clean_kind, convert, pad_id
from train.models.checkpoints import Source
from train.models.trained_prior import TrainedPrior
from train.models.wording import Wording, image_spec, null_text
from train.progress import step

if TYPE_CHECKING:
    from train.data.dataset import DataSet


def export_bundle(
    source: Source,
    out: Path,
    words: Wording,
    *,
    precisions: Sequence[str] = (REFERENCE,),
    data: DataSet | None = None,
    robustness: tuple[Robustness, ...] = (),
    purification: Purifier = None,
    prior: TrainedPrior | None = None,
    prior_gradient: str = "exact",
    fused: bool = False,
    force: bool = False,
) -> Manifest:
    """Write the bundle of `source` to `out`, and return its manifest.

    precisions: fp32, fp16, int8 and int8-qdq, each verified. data: test images, on which each of them
    has to answer as the model does, under attack too; without it only embeddings are compared.
    int8-qdq takes its ranges from it.
    purification: what the bundle recommends; it has to be earned by a measurement. prior: what
    CLIPure-Diff needs; prior_gradient is exact or forward, see export.diffusion_prior. fused: write
    fused.<precision>.onnx of each precision too, see export.fused.

    An existing bundle is replaced only with `force`, and only once the new one is verified. Raises
    ExportError; then nothing is left behind.
    """
    out = out.resolve()  # a link stays, what it points to is replaced
    check_target(out, force)
    for name in precisions:
        if PRECISIONS[name].needs_images and data is None:
            raise ExportError(f"{name} takes its ranges from images: name a data set with --data")
    image = image_spec(source.model)
    with workshop(out) as work:
        manifest = _write_encoders(work, source, image, words)
        with step("writing the tokenizer, the null text and the golden input"):
            text = convert(source.tokenizer).to_str(pretty=False)
            (work / TOKENIZER).write_text(text, encoding="utf-8")
            vector = null_text(source, words.null_templates)
            (work / EMBEDDINGS).write_bytes(save({"null_text": vector}))
            np.savez(work / GOLDEN, **golden(work, source, manifest))
        manifest = _write_precisions(work, source, manifest, precisions, data)
        spec = prior and write_prior(work, prior, source, words.null_templates, prior_gradient)
        manifest = dataclasses.replace(
            manifest,
            robustness=robustness,
            purification=purification,
            prior=spec,
        )
        Bundle.write_manifest(work, manifest)
        if data is not None:
            manifest = _compare_answers(work, source, manifest, data)
        if fused:
            _write_fused(work, manifest)
        Bundle.write_manifest(work, manifest)
        Bundle(work).verify()
        move(work, out)
    return Bundle(out).manifest


def check_target(out: Path, force: bool) -> None:
    """Raises ExportError where a bundle cannot be put at `out`."""
    output.check_target(out, MANIFEST, "bundle", force)


def _write_precisions(
    work: Path,
    source: Source,
    manifest: Manifest,
    precisions: Sequence[str],
    data: DataSet | None = None,
) -> Manifest:
    """All precisions out of the fp32 encoders in `work`, which go if they are not among them."""
    (original,) = manifest.precisions.values()
    has_tokens = manifest.tokens is not None
    variants = {precision: _variant(precision, has_tokens) for precision in precisions}
    manifest = dataclasses.replace(manifest, precisions=variants)
    for precision, variant in variants.items():
        if precision != REFERENCE:
            with step(f"making {precision} encoders"):
                images = () if data is None else pictures(data, manifest.image)
                convert_encoders(work, original, variant, precision, manifest, source, images)
    # Only now, as the other precisions are converted from the fp32 graph with both outputs.
    for precision, variant in variants.items():
        if variant.image_tokens is not None:
            path, tokens = work / variant.image_encoder, work / variant.image_tokens
            split_outputs(path, {EMBEDDING: path, TOKENS: tokens})
        with step(f"comparing {precision} with PyTorch"):
            parity = verify(work, source, manifest, precision)
        variants[precision] = dataclasses.replace(variant, parity=parity)
    used = {name for v in variants.values() for name in (v.image_encoder, v.text_encoder)}
    for name in {original.image_encoder, original.text_encoder} - used:
        for path in work.glob(f"{name}*"):
            path.unlink()
    with step("measuring how long each precision takes"):
        times = cpu_ms(work, manifest)
    timed = {
        name: dataclasses.replace(variant, cpu_ms=times[name]) for name, variant in variants.items()
    }
    return dataclasses.replace(manifest, precisions=timed)


def _compare_answers(work: Path, source: Source, manifest: Manifest, data: DataSet) -> Manifest:
    from export.checks import (
        fidelity,  # with it the training package, which itself builds on this one
    )

    with step(f"comparing answers on {data.name}, attacked images too"):
        measured = fidelity.measure(Bundle(work), source, data)
    fidelity.check(measured, data.name)
    variants = {
        name: dataclasses.replace(variant, parity={**variant.parity, **measured[name]})
        for name, variant in manifest.precisions.items()
    }
    return dataclasses.replace(manifest, precisions=variants)


def _write_fused(work: Path, manifest: Manifest) -> None:
    head = Head(check_purifier(manifest.purification))
    for precision in manifest.precisions:
        with step(f"fusing all from image to answer in {precision}"):
            runtime = Runtime(work, device="cpu", precision=precision)
            write_fused(runtime, work / f"fused.{precision}.onnx", head, shared=True)


def _variant(precision: str, has_tokens: bool) -> Variant:
    text = PRECISIONS[precision].text
    tokens = f"image_tokens.{precision}.onnx" if has_tokens else None
    return Variant(f"image_encoder.{precision}.onnx", f"text_encoder.{text}.onnx", tokens)


def _write_encoders(work: Path, source: Source, image: ImageSpec, words: Wording) -> Manifest:
    """Write the fp32 encoders, from which all others are made; tokens are a second output."""
    model = source.model
    context_length = int(source.tokenizer.context_length)
    names = _variant(REFERENCE, has_tokens=True)
    with step("exporting the image encoder"):
        tokens = encoders.export_image_encoder(model, image.size, work / names.image_encoder)
    with step("exporting the text encoder"):
        cut = encoders.export_text_encoder(model, context_length, work / names.text_encoder)
    vector = null_text(source, words.null_templates)
    bias = model.logit_bias
    return Manifest(
        description=words.description,
        source=source.record,
        embed_dim=len(vector),
        image=image,
        text=TextSpec(context_length, clean_kind(source.tokenizer), cut, pad_id(source.tokenizer)),
        tokens=tokens,
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=0.0 if bias is None else bias.item(),
        templates=words.templates,
        null_templates=words.null_templates,
        purification=None,
        precisions={REFERENCE: names},
    )
