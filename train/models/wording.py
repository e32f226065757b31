"""Prompts, null text and image preprocessing of a model, as a bundle stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg

from edgeclip.labels import check_templates
from edgeclip.manifest import DEFAULT_TEMPLATES, ImageSpec
from train.errors import ModelError
from train.models.checkpoints import Source


@dataclass(frozen=True)
class Wording:
    """Description of a bundle, and the prompt templates for its labels."""

    description: str
    templates: tuple[str, ...]
    null_templates: tuple[str, ...]


def wording(
    source: Source,
    description: str | None = None,
    templates: Sequence[str] | None = None,
    null_templates: Sequence[str] | None = None,
) -> Wording:
    """Return the wording, filling in None from the model's folder, then from the defaults.

    Raises LabelError for a template without a placeholder for the label.
    """
    folder_wording = source.wording
    prompts = tuple(templates or folder_wording.get("templates") or DEFAULT_TEMPLATES)
    null_prompts = tuple(null_templates or folder_wording.get("null_templates") or prompts)
    check_templates(prompts)
    check_templates(null_prompts, "null templates")
    text = description or folder_wording.get("description") or source.title
    return Wording(str(text), prompts, null_prompts)


def image_spec(model: Any) -> ImageSpec:
    """Return open_clip's preprocessing of `model` for the runtime. Raises ModelError."""
    settings = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    size = settings.size
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    if settings.interpolation not in ("bicubic", "bilinear"):
        raise ModelError(f"interpolation {settings.interpolation!r} is not supported")
    if settings.resize_mode == "shortest" and height != width:
        # open_clip resizes these with bicubic, whatever the interpolation setting.
        raise ModelError("an input that is not square needs resize_mode squash or longest")
    return ImageSpec(
        (int(height), int(width)),
        _rgb(settings.mean),
        _rgb(settings.std),
        settings.resize_mode,
        settings.interpolation,
        int(settings.fill_color),
    )


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


@torch.no_grad()
def null_text(source: Source, templates: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return the null text of CLIPure: the unit mean embedding (D,) of `templates` without a label."""
    ids = source.tokenizer([template.replace("{}", "") for template in templates])
    mean = source.model.encode_text(ids, normalize=True).mean(dim=0)
    vector: npt.NDArray[np.float32] = F.normalize(mean, dim=0).numpy()
    return vector
