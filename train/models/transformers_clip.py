"""CLIP as Hugging Face's transformers saves it: weights by its names, and folders with config.json."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.errors import ModelError
from train.progress import brief, quiet, say

CONFIG = "config.json"
PREPROCESSING = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # holds the same in transformers 5
ACTIVATIONS = {"quick_gelu": True, "gelu": False}  # hidden_act -> whether it is QuickGELU
INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # by Pillow's number

RENAMED = [
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
BARE = "embeddings.patch_embedding.weight"  # of CLIPVisionModel in transformers 5
TOWER = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
QUERY = re.compile(r"^(.*\.attn\.)q_proj\.(weight|bias)$")


def is_transformers(state: Mapping[str, Any]) -> bool:
    """Tell whether the keys of a state dict are those of transformers' CLIP."""
    return BARE in state or any(key.startswith(("vision_model.", "text_model.")) for key in state)


def to_open_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename transformers' weights, and join queries, keys and values. Unknown keys stay."""
    if BARE in state:
        state = {f"vision_model.{k}" if k.startswith(TOWER) else k: v for k, v in state.items()}
    found = {}
    for key, value in state.items():
        if key.endswith(".position_ids"):  # 0, 1, 2 ..., saved by old versions
            continue
        for pattern, name in RENAMED:
            key = pattern.sub(name, key)
        found[key] = value.T if key in TRANSPOSED else value
    for key in list(found):
        query = QUERY.match(key)
        parts = [f"{query[1]}{name}_proj.{query[2]}" for name in "qkv"] if query else []
        if query and all(part in found for part in parts):
            found[f"{query[1]}in_proj_{query[2]}"] = torch.cat([found.pop(part) for part in parts])
    return found


def is_folder(folder: Path) -> bool:
    """Tell whether a folder holds a model of transformers' CLIP, or its image tower."""
    try:
        kind = _read_json(folder / CONFIG).get("model_type")
    except ModelError:
        return False
    return str(kind).startswith("clip")


def quick_gelu_beside(path: Path) -> bool | None:
    """Return whether config.json in the folder of `path` says QuickGELU; None if it says nothing."""
    if not is_folder(path.parent):
        return None
    whole = _read_json(path.parent / CONFIG)
    towers = [whole.get(f"{name}_config") or whole for name in ("vision", "text")]
    named = {tower.get("hidden_act", "quick_gelu") for tower in towers}  # transformers' default
    return ACTIVATIONS.get(named.pop()) if len(named) == 1 else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return open_clip's model_cfg for the model in `folder`. Raises ModelError."""
    from transformers import CLIPConfig

    path = folder / CONFIG
    whole = _read_json(path)
    kind = whole.get("model_type")
    if kind == "clip_vision_model":
        raise ModelError(
            f"{folder} holds an image tower alone: name its weights with --visual, and the model and "
            "the weights that it was trained from"
        )
    if kind != "clip":
        raise ModelError(f"{path} has the model_type {kind!r}: only clip is supported")
    try:
        with quiet():
            config = CLIPConfig.from_dict(whole)
        text, vision = config.text_config, config.vision_config
        if vision.num_channels != 3 or not isinstance(vision.image_size, int):
            raise ValueError("its images are not square, or not of three channels")
        model_cfg = {
            "embed_dim": config.projection_dim,
            "quick_gelu": _quick_gelu(text.hidden_act, vision.hidden_act),
            "vision_cfg": _tower(vision)
            | {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
            },
            "text_cfg": _tower(text)
            | {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "heads": text.num_attention_heads,
                **_pooling(text.eos_token_id),
            },
        }
    except Exception as err:  # transformers checks its configurations with errors of any kind
        raise ModelError(f"{path} cannot be exported: {brief(err)}") from err
    if has_tokenizer(folder):
        model_cfg["text_cfg"]["hf_tokenizer_name"] = folder.resolve().name
    return model_cfg


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _tower(config: Any) -> dict[str, Any]:
    ratio = config.intermediate_size / config.hidden_size
    if int(ratio * config.hidden_size) != config.intermediate_size:  # as open_clip rounds
        ratio = math.nextafter(ratio, math.inf)
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "mlp_ratio": ratio,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }


def _quick_gelu(*activations: str) -> bool:
    if len(set(activations)) > 1 or activations[0] not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act {' and '.join(sorted(set(activations)))} is not supported: only quick_gelu "
            "or gelu, of both towers"
        )
    return ACTIVATIONS[activations[0]]


def _pooling(eos: Any) -> dict[str, Any]:
    """Return how the end of a prompt is found: transformers reads the 2 of old configurations, which
    is no end mark, as the highest id."""
    if eos == 2:
        return {"pool_type": "argmax"}
    if not isinstance(eos, int):
        raise TypeError(f"eos_token_id must be one number, got {eos!r}")
    return {"pool_type": "eos", "eos_id": eos}


def read_preprocessing(folder: Path, size: int) -> dict[str, Any]:
    """Return open_clip's preprocess_cfg for images of `size`. Raises ModelError for another way."""
    path = next((folder / x for x in (PREPROCESSING, PROCESSOR) if (folder / x).is_file()), None)
    if path is None:
        say(f"{folder} holds no {PREPROCESSING}: assuming CLIP's own mean, std and bicubic resize")
        return {}
    found = _read_json(path)
    found = found.get("image_processor", found)
    try:
        return _preprocessing(found, size)
    except (ValueError, TypeError, LookupError, AttributeError) as err:
        raise ModelError(f"{path} cannot be exported: {brief(err)}") from err


def _preprocessing(found: Mapping[str, Any], size: int) -> dict[str, Any]:
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not found.get(name, True):
            raise ValueError(f"{name} must be true")
    if not math.isclose(found.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError("rescale_factor must be 1/255")
    interpolation = found.get("resample", 3)
    if interpolation not in INTERPOLATION:
        raise ValueError(f"resample {interpolation} is neither bilinear (2) nor bicubic (3)")
    edges = found.get("size", size)
    edges = {"shortest_edge": edges} if isinstance(edges, int) else edges
    squash = "height" in edges
    sizes = {edges["height"], edges["width"]} if squash else {edges["shortest_edge"]}
    if found.get("do_center_crop", True):
        crop = found.get("crop_size", size)
        sizes |= {crop} if isinstance(crop, int) else {crop["height"], crop["width"]}
    elif not squash:
        raise ValueError("do_center_crop must be true where size has a shortest_edge")
    if sizes != {size}:
        raise ValueError(f"size and crop_size must be the model's {size}, not {sorted(sizes)}")
    return {
        "mean": found["image_mean"],
        "std": found["image_std"],
        "interpolation": INTERPOLATION[interpolation],
        "resize_mode": "squash" if squash else "shortest",
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it is no object")
    except (OSError, ValueError, TypeError) as err:
        raise ModelError(f"{path} cannot be read: {brief(err)}") from err
    return found
