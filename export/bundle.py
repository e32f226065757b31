"""Export of a model to a bundle, which is written completely and verified, or not at all."""

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
from edgeclip.manifest import ImageSpec, Manifest, Robustness, TextSpec, Variant
from edgeclip.precisions import PRECISIONS, REFERENCE
from edgeclip.purify import Purifier
from export import ExportError, output
from export.checks.latency import cpu_ms
from export.checks.parity import verify
from export.fused import check_purifier, write_fused
from export.golden import golden_values
from export.graphs import encoders
from export.graphs.fused import Head
from export.graphs.precisions import calibration_images, convert_encoders, needs_images
from export.graphs.prior import write_prior
from export.graphs.product_errors import Inputs
from export.graphs.save import split_outputs
from export.output import publish, staging_directory
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

    precisions: any of fp32, fp16, int8 and int8-qdq; each is verified.
    data: test images on which each precision must answer as the model does, clean and under attack;
    without them, only embeddings are compared. int8-qdq, and int8 of a convolutional tower, take
    their ranges from them.
    robustness, purification: measurements, and the purification they recommend; see
    `evidence.read`.
    prior, prior_gradient: diffusion prior for CLIPure-Diff, and its gradient, exact or forward; see
    export.diffusion_prior.
    fused: also write fused.<precision>.onnx; see export.fused.
    force: replace an existing bundle, once the new one is verified.

    Raises EdgeclipError; then nothing is left behind.
    """
    out = out.resolve()  # a link stays, and its target is replaced
    check_target(out, force)
    for name in precisions:
        if data is None and needs_images(name, source):
            raise ExportError(f"{name} takes its ranges from images: name a data set with --data")
    image = image_spec(source.model)
    with staging_directory(out) as staging:
        manifest = _write_encoders(staging, source, image, words)
        with step("writing the tokenizer, the null text and the golden values"):
            text = convert(source.tokenizer).to_str(pretty=False)
            (staging / TOKENIZER).write_text(text, encoding="utf-8")
            vector = null_text(source, words.null_templates)
            (staging / EMBEDDINGS).write_bytes(save({"null_text": vector}))
            np.savez(staging / GOLDEN, **golden_values(staging, source, manifest))
        manifest = _write_precisions(staging, source, manifest, precisions, data)
        spec = None
        if prior is not None:
            spec = write_prior(staging, prior, source, words.null_templates, prior_gradient)
        manifest = dataclasses.replace(
            manifest, robustness=robustness, purification=purification, prior=spec
        )
        Bundle.write_manifest(staging, manifest)
        if data is not None:
            manifest = _compare_answers(staging, source, manifest, data)
        if fused:
            _write_fused(staging, manifest)
        Bundle.write_manifest(staging, manifest)
        Bundle(staging).verify()
        publish(staging, out)
    return Bundle(out).manifest


def check_target(out: Path, force: bool) -> None:
    """Raise ExportError unless a bundle may be written at `out`."""
    output.check_target(out, MANIFEST, "bundle", force)


def _write_encoders(staging: Path, source: Source, image: ImageSpec, words: Wording) -> Manifest:
    """Export the fp32 encoders, with tokens as a second output, and return the manifest so far."""
    model = source.model
    context_length, padding = int(source.tokenizer.context_length), pad_id(source.tokenizer)
    names = _variant(REFERENCE, has_tokens=True)
    with step("exporting the image encoder"):
        tokens = encoders.export_image_encoder(model, image.size, staging / names.image_encoder)
    with step("exporting the text encoder"):
        text = staging / names.text_encoder
        cut = encoders.export_text_encoder(model, context_length, padding, text)
    vector = null_text(source, words.null_templates)
    bias = model.logit_bias
    return Manifest(
        description=words.description,
        source=source.record,
        embed_dim=len(vector),
        image=image,
        text=TextSpec(context_length, clean_kind(source.tokenizer), cut, padding),
        tokens=tokens,
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=0.0 if bias is None else bias.item(),
        templates=words.templates,
        null_templates=words.null_templates,
        purification=None,
        precisions={REFERENCE: names},
    )


def _variant(precision: str, has_tokens: bool) -> Variant:
    text = PRECISIONS[precision].text
    tokens = f"image_tokens.{precision}.onnx" if has_tokens else None
    return Variant(f"image_encoder.{precision}.onnx", f"text_encoder.{text}.onnx", tokens)


def _write_precisions(
    staging: Path,
    source: Source,
    manifest: Manifest,
    precisions: Sequence[str],
    data: DataSet | None = None,
) -> Manifest:
    """Convert and verify all precisions; remove the fp32 encoders unless fp32 is one of them."""
    (original,) = manifest.precisions.values()
    has_tokens = manifest.tokens is not None
    variants = {precision: _variant(precision, has_tokens) for precision in precisions}
    manifest = dataclasses.replace(manifest, precisions=variants)
    checks: dict[str, Sequence[Inputs]] = {}
    for precision, variant in variants.items():
        if precision != REFERENCE:
            with step(f"converting the encoders to {precision}"):
                ranges: Sequence[Inputs] = ()
                if data is not None and needs_images(precision, source):
                    batches = calibration_images(data, manifest.image)
                    ranges, checks[precision] = batches[:-1] or batches, batches[-1:]
                convert_encoders(staging, original, variant, precision, manifest, source, ranges)
    # Only now: the other precisions are converted from the fp32 graph with both outputs.
    for precision, variant in variants.items():
        if variant.image_tokens is not None:
            path, tokens = staging / variant.image_encoder, staging / variant.image_tokens
            split_outputs(path, {EMBEDDING: path, TOKENS: tokens})
        with step(f"comparing {precision} with PyTorch"):
            parity = verify(staging, source, manifest, precision, checks.get(precision, ()))
        variants[precision] = dataclasses.replace(variant, parity=parity)
    used = {name for v in variants.values() for name in (v.image_encoder, v.text_encoder)}
    for name in {original.image_encoder, original.text_encoder} - used:
        for path in staging.glob(f"{name}*"):
            path.unlink()
    with step("measuring the latency of each precision"):
        times = cpu_ms(staging, manifest)
    timed = {
        name: dataclasses.replace(variant, cpu_ms=times[name]) for name, variant in variants.items()
    }
    return dataclasses.replace(manifest, precisions=timed)


def _compare_answers(staging: Path, source: Source, manifest: Manifest, data: DataSet) -> Manifest:
    from export.checks import fidelity  # imported late: it needs the train extra

    with step(f"comparing answers on {data.name}, clean and attacked"):
        measured = fidelity.measure(Bundle(staging), source, data)
    fidelity.check(measured, data.name)
    variants = {
        name: dataclasses.replace(variant, parity={**variant.parity, **measured[name]})
        for name, variant in manifest.precisions.items()
    }
    return dataclasses.replace(manifest, precisions=variants)


def _write_fused(staging: Path, manifest: Manifest) -> None:
    head = Head(check_purifier(manifest.purification))
    for precision in manifest.precisions:
        with step(f"writing the fused graph in {precision}"):
            runtime = Runtime(staging, device="cpu", precision=precision)
            write_fused(runtime, staging / f"fused.{precision}.onnx", head, shared=True)
