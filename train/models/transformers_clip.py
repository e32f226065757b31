"""CLIP in the format of Hugging Face transformers: key names of weights, and folders with config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from train.errors import ModelError
from train.progress import brief, quiet, say

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

CONFIG = "config.json"
PREPROCESSING = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # the same settings, since transformers 5
QUICK_GELU = {"quick_gelu": True, "gelu": False}  # hidden_act -> QuickGELU or not
INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # by Pillow's number

KEY_PATTERNS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
        (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
        (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
        (r"^text_model\.final_layer_norm\.", "ln_final."),
        (r"^text_projection\.weight$", "text_projection"),
        (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
        (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
        (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
        (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
        (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
        (r"^visual_projection\.weight$", "visual.proj"),
        (r"\.layer_norm([12])\.", r".ln_\1."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        (r"\.self_attn\.", ".attn."),
    )
]
TRANSPOSED = ("text_projection", "visual.proj")  # open_clip multiplies by them from the right
BARE_TOWER_KEY = "embeddings.patch_embedding.weight"  # of CLIPVisionModel in transformers 5
BARE_TOWER_PREFIXES = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
QUERY = re.compile(r"^(.*\.attn\.)q_proj\.(weight|bias)$")


def is_transformers(state: Mapping[str, Any]) -> bool:
    """Tell whether a state dict has the key names of transformers' CLIP."""
    return BARE_TOWER_KEY in state or any(
        key.startswith(("vision_model.", "text_model.")) for key in state
    )


def to_open_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' keys to open_clip's, joining queries, keys and values.

    Unknown keys stay.
    """
    if BARE_TOWER_KEY in state:
        state = {
            f"vision_model.{key}" if key.startswith(BARE_TOWER_PREFIXES) else key: value
            for key, value in state.items()
        }
    renamed = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):  # 0, 1, 2 ..., saved by old versions
            continue
        for pattern, name in KEY_PATTERNS:
            key = pattern.sub(name, key)
        renamed[key] = value.T if key in TRANSPOSED else value
    for key in list(renamed):
        query = QUERY.match(key)
        joint = [f"{query[1]}{name}_proj.{query[2]}" for name in "qkv"] if query else []
        if query and all(name in renamed for name in joint):
            tensors = [renamed.pop(name) for name in joint]
            renamed[f"{query[1]}in_proj_{query[2]}"] = torch.cat(tensors)
    return renamed


def is_folder(folder: Path) -> bool:
    """Tell whether a folder holds transformers' CLIP, or its image tower alone."""
    try:
        kind = _read_json(folder / CONFIG).get("model_type")
    except ModelError:
        return False
    return str(kind).startswith("clip")


def quick_gelu_beside(path: Path) -> bool | None:
    """Return whether config.json beside `path` names QuickGELU; None if it is unknown."""
    if not is_folder(path.parent):
        return None
    document = _read_json(path.parent / CONFIG)
    towers = [document.get(f"{name}_config") or document for name in ("vision", "text")]
    # Without hidden_act, transformers takes QuickGELU.
    activations = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    return QUICK_GELU.get(activations.pop()) if len(activations) == 1 else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return open_clip's model_cfg for the model in `folder`. Raises ModelError."""
    from transformers import CLIPConfig

    path = folder / CONFIG
    document = _read_json(path)
    kind = document.get("model_type")
    if kind == "clip_vision_model":
        raise ModelError(
            f"{folder} holds an image tower alone: name its weights with --visual, and its base model "
            "and weights as usual"
        )
    if kind != "clip":
        raise ModelError(f"{path} has the model_type {kind!r}: only clip is supported")
    try:
        with quiet():
            config = CLIPConfig.from_dict(document)
        model_cfg = _model_cfg(config)
    except Exception as err:  # transformers validates configurations with errors of any kind
        raise ModelError(f"{path} cannot be converted: {brief(err)}") from err
    if has_tokenizer(folder):
        model_cfg["text_cfg"]["hf_tokenizer_name"] = folder.resolve().name
    return model_cfg


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _model_cfg(config: CLIPConfig) -> dict[str, Any]:
    """Convert a configuration. Raises ValueError and TypeError for what open_clip cannot express."""
    text = cast("CLIPTextConfig", config.text_config)
    vision = cast("CLIPVisionConfig", config.vision_config)
    if vision.num_channels != 3 or not isinstance(vision.image_size, int):
        raise ValueError("its images are not square, or not of three channels")
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": _quick_gelu(text.hidden_act, vision.hidden_act),
        "vision_cfg": _transformer_cfg(vision)
        | {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": _transformer_cfg(text)
        | {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
        }
        | _pooling(text.eos_token_id),
    }


def _transformer_cfg(config: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    ratio = config.intermediate_size / config.hidden_size
    if int(ratio * config.hidden_size) != config.intermediate_size:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": ratio,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }


def _quick_gelu(*activations: str) -> bool:
    if len(set(activations)) > 1 or activations[0] not in QUICK_GELU:
        raise ValueError(
            f"hidden_act {' and '.join(sorted(set(activations)))} is not supported: only quick_gelu "
            "or gelu, the same in both towers"
        )
    return QUICK_GELU[activations[0]]


def _pooling(eos: object) -> dict[str, Any]:
    """Return the text pooling settings for the id of the end mark.

    Old configurations have 2, which is not the end mark; transformers then pools at the highest id.
    """
    if eos == 2:
        return {"pool_type": "argmax"}
    if not isinstance(eos, int):
        raise TypeError(f"eos_token_id must be one number, got {eos!r}")
    return {"pool_type": "eos", "eos_id": eos}


def read_preprocessing(folder: Path, size: int) -> dict[str, Any]:
    """Return open_clip's preprocess_cfg for images of `size`. Raises ModelError if unsupported."""
    path = next((folder / x for x in (PREPROCESSING, PROCESSOR) if (folder / x).is_file()), None)
    if path is None:
        say(f"{folder} holds no {PREPROCESSING}: assuming CLIP's mean, std and bicubic resize")
        return {}
    document = _read_json(path)
    try:
        return _preprocess_cfg(document.get("image_processor", document), size)
    except (ValueError, TypeError, LookupError, AttributeError) as err:
        raise ModelError(f"{path} cannot be converted: {brief(err)}") from err


def _preprocess_cfg(settings: Mapping[str, Any], size: int) -> dict[str, Any]:
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not settings.get(name, True):
            raise ValueError(f"{name} must be true")
    if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError("rescale_factor must be 1/255")
    interpolation = settings.get("resample", 3)
    if interpolation not in INTERPOLATION:
        raise ValueError(f"resample {interpolation} is neither bilinear (2) nor bicubic (3)")
    return {
        "mean": settings["image_mean"],
        "std": settings["image_std"],
        "interpolation": INTERPOLATION[interpolation],
        "resize_mode": _resize_mode(settings, size),
    }


def _resize_mode(settings: Mapping[str, Any], size: int) -> str:
    """Return open_clip's resize_mode. Raises ValueError where the output is not `size` square."""
    edges = settings.get("size", size)
    edges = {"shortest_edge": edges} if isinstance(edges, int) else edges
    squash = "height" in edges
    sizes = {edges["height"], edges["width"]} if squash else {edges["shortest_edge"]}
    if settings.get("do_center_crop", True):
        crop = settings.get("crop_size", size)
        sizes |= {crop} if isinstance(crop, int) else {crop["height"], crop["width"]}
    elif not squash:
        raise ValueError("do_center_crop must be true where size has a shortest_edge")
    if sizes != {size}:
        raise ValueError(f"size and crop_size must be the model's {size}, not {sorted(sizes)}")
    return "squash" if squash else "shortest"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise TypeError("it is no JSON object")
    except (OSError, ValueError, TypeError) as err:
        raise ModelError(f"{path} cannot be read: {brief(err)}") from err
    return document
