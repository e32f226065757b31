"""A model in PyTorch written as a bundle: complete and verified, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from safetensors.numpy import save

from edgeclip import Runtime
from edgeclip.bundle import EMBEDDINGS, GOLDEN, MANIFEST, TOKENIZER, Bundle
from edgeclip.labels import check_templates
from edgeclip.manifest import (
    DEFAULT_TEMPLATES,
    ImageSpec,
    Manifest,
    Robustness,
    TextSpec,
    Variant,
)
from edgeclip.purify import Purifier
from export import ExportError, files, to_onnx
from export.checkpoints import Source
from export.diffusion_prior import TrainedPrior, write_prior
from export.files import move, workshop
from export.fused import check_purifier, write_fused
from export.fused_graph import Head
from export.progress import step
from export.quantize import convert_encoders, pictures
from export.tokenizer import clean_kind, convert, pad_id
from export.verify import cpu_ms, golden, verify

if TYPE_CHECKING:
    from train.data import DataSet


@dataclasses.dataclass(frozen=True)
class Wording:
    """What a bundle says about itself, and the prompts that its labels are put into."""

    description: str
    templates: tuple[str, ...]
    null_templates: tuple[str, ...]


def wording(
    source: Source,
    description: str | None = None,
    templates: Sequence[str] | None = None,
    null_templates: Sequence[str] | None = None,
) -> Wording:
    """The given wording; what is None is the model folder's own, or the default.

    Raises LabelError for a template without a place for the label.
    """
    own = source.wording
    chosen = tuple(templates or own.get("templates") or DEFAULT_TEMPLATES)
    null = tuple(null_templates or own.get("null_templates") or chosen)
    check_templates(chosen)
    check_templates(null, "null templates")
    told = description or own.get("description") or source.title
    return Wording(str(told), chosen, null)


def export_bundle(
    source: Source,
    out: Path,
    words: Wording,
    *,
    precisions: Sequence[str] = ("fp32",),
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
    if "int8-qdq" in precisions and data is None:
        raise ExportError("int8-qdq takes its ranges from images: name a data set with --data")
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
    files.check_target(out, MANIFEST, "bundle", force)


def image_spec(model: Any) -> ImageSpec:
    """open_clip's preprocessing of `model`, as the runtime repeats it. Raises ExportError."""
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    size = settings.size if isinstance(settings.size, int) else tuple(settings.size)
    height, width = (size, size) if isinstance(size, int) else size
    if settings.interpolation not in ("bicubic", "bilinear"):
        raise ExportError(f"interpolation {settings.interpolation!r} is not supported")
    if settings.resize_mode == "shortest" and height != width:
        # open_clip takes another way here, bicubic whatever the interpolation says.
        raise ExportError("an input that is not square needs resize_mode squash or longest")
    mean, std = (tuple(float(v) for v in values) for values in (settings.mean, settings.std))
    return ImageSpec(
        (int(height), int(width)),
        mean,
        std,
        settings.resize_mode,
        settings.interpolation,
        int(settings.fill_color),
    )


@torch.no_grad()
def null_text(source: Source, templates: Sequence[str]) -> np.ndarray:
    """The unit embedding, float32 (D,), of the mean of `templates` without a label (CLIPure)."""
    ids = source.tokenizer([template.replace("{}", "") for template in templates])
    mean = source.model.encode_text(ids, normalize=True).mean(dim=0)
    return F.normalize(mean, dim=0).numpy()


def _write_precisions(
    work: Path,
    source: Source,
    manifest: Manifest,
    precisions: Sequence[str],
    data: DataSet | None = None,
) -> Manifest:
    """All precisions out of the fp32 encoders in `work`, which go if they are not among them."""
    (original,) = manifest.precisions.values()
    variants = {precision: _variant(precision) for precision in precisions}
    manifest = dataclasses.replace(manifest, precisions=variants)
    for precision, variant in variants.items():
        if precision != "fp32":
            with step(f"making {precision} encoders"):
                images = () if data is None else pictures(data, manifest.image)
                convert_encoders(work, original, variant, precision, manifest, source, images)
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
    from export import fidelity  # with it the training package, which itself builds on this one

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


def _variant(precision: str) -> Variant:
    text = "fp32" if precision == "int8-qdq" else precision  # texts are encoded once, and cached
    return Variant(f"image_encoder.{precision}.onnx", f"text_encoder.{text}.onnx")


def _write_encoders(work: Path, source: Source, image: ImageSpec, words: Wording) -> Manifest:
    """The fp32 encoders, of which all others are made."""
    model = source.model
    context_length = int(source.tokenizer.context_length)
    names = _variant("fp32")
    with step("exporting the image encoder"):
        tokens = to_onnx.export_image_encoder(model, image.size, work / names.image_encoder)
    with step("exporting the text encoder"):
        cut = to_onnx.export_text_encoder(model, context_length, work / names.text_encoder)
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
        precisions={"fp32": names},
    )
