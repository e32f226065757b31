"""Wording of a model: its templates, null text and image preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg

from edgeclip.labels import check_templates
from edgeclip.manifest import (
    DEFAULT_TEMPLATES,
    ImageSpec,
)
from train.errors import ModelError
from train.models.checkpoints import Source


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


def image_spec(model: Any) -> ImageSpec:
    """open_clip's preprocessing of `model`, as the runtime repeats it. Raises ModelError."""
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    size = settings.size if isinstance(settings.size, int) else tuple(settings.size)
    height, width = (size, size) if isinstance(size, int) else size
    if settings.interpolation not in ("bicubic", "bilinear"):
        raise ModelError(f"interpolation {settings.interpolation!r} is not supported")
    if settings.resize_mode == "shortest" and height != width:
        # open_clip takes another way here, bicubic whatever the interpolation says.
        raise ModelError("an input that is not square needs resize_mode squash or longest")
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
