"""Model architectures, by an open_clip name or from a folder's configuration; no weights are read."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg

from train.errors import ModelError
from train.models import transformers_clip, transformers_text
from train.progress import brief, quiet, say

CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Architecture:
    """Configuration of a model."""

    name: str
    config: dict[str, Any]  # open_clip's model_cfg
    identifier: str = ""  # for open_clip's factory; "" for a transformers folder
    folder: Path | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # overrides of open_clip's defaults
    wording: Mapping[str, Any] = field(default_factory=dict)


def is_model_folder(folder: Path) -> bool:
    """Tell whether a folder describes a model."""
    return (folder / CONFIG).is_file() or transformers_clip.is_folder(folder)


def find_architecture(model: str) -> Architecture:
    """Find the architecture of a model folder or an open_clip name. Raises ModelError."""
    folder, name = Path(model), model.replace("/", "-")
    if (folder / CONFIG).is_file():
        return _from_folder(folder)
    if transformers_clip.is_folder(folder):
        return _from_transformers(folder)
    if name in open_clip.list_models():
        return Architecture(name, open_clip.get_model_config(name), name)
    if (folder / transformers_clip.CONFIG).is_file():
        return _from_transformers(folder)  # raises: the configuration is not CLIP's
    if folder.is_dir():
        raise ModelError(
            f"{folder} holds no {CONFIG} or {transformers_clip.CONFIG}: name the folder of a model"
        )
    close = difflib.get_close_matches(name, open_clip.list_models(), n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
    raise ModelError(f"unknown model {model!r}: {hint}")


def _from_folder(folder: Path) -> Architecture:
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = document["model_cfg"]
        wording = document.get("edgeclip", {})
        if not all(
            isinstance(x, dict) for x in (config["vision_cfg"], config["text_cfg"], wording)
        ):
            raise TypeError("vision_cfg, text_cfg and edgeclip must be objects")
        for name in ("templates", "null_templates"):
            if not isinstance(wording.get(name, []), list):
                raise TypeError(f"{name} must be a list")
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ModelError(f"{folder / CONFIG} is no open_clip configuration: {err!r}") from err
    name = folder.resolve().name
    return Architecture(name, config, f"local-dir:{folder}", folder, wording=wording)


def _from_transformers(folder: Path) -> Architecture:
    try:
        config = transformers_clip.read_config(folder)
    except ImportError as err:
        raise ModelError(f"{err}: {folder} needs pip install 'edgeclip[export]'") from err
    preprocess = transformers_clip.read_preprocessing(folder, config["vision_cfg"]["image_size"])
    return Architecture(folder.resolve().name, config, folder=folder, preprocess=preprocess)


def build_model(
    architecture: Architecture, quick_gelu: bool, preprocess: Mapping[str, Any] | None = None
) -> Any:
    """Build the model in evaluation mode, with random weights from seed 0.

    preprocess: settings that belong to the weights; they override the architecture's. Raises
    ModelError.
    """
    torch.manual_seed(0)
    text, settings = architecture.config["text_cfg"], {}
    try:
        with quiet():
            if transformers_text.has_tower(text):
                settings["text_cfg"] = transformers_text.build_settings(text, architecture.folder)
            if architecture.identifier:
                model = open_clip.create_model(
                    architecture.identifier,
                    load_weights=False,
                    force_preprocess_cfg=dict(preprocess or {}),
                    quick_gelu=quick_gelu,
                    **settings,
                )
            else:
                model = CLIP(**architecture.config | {"quick_gelu": quick_gelu})
                settings = dataclasses.asdict(PreprocessCfg()) | dict(architecture.preprocess)
                set_model_preprocess_cfg(model, settings | {"size": model.visual.image_size})
    except Exception as err:  # a wrong entry of a configuration can raise anything
        raise ModelError(f"{architecture.name} cannot be built: {brief(err)}") from err
    return model.eval().requires_grad_(False)


def load_tokenizer(architecture: Architecture) -> Any:
    """Load open_clip's tokenizer for the architecture. Raises ModelError."""
    text, folder = architecture.config["text_cfg"], architecture.folder
    settings = transformers_text.tokenizer_settings(text, folder)
    relative = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if relative and folder:
        settings["bpe_path"] = str(folder / relative)
    try:
        with quiet():
            if architecture.identifier:
                return open_clip.get_tokenizer(architecture.identifier, **settings)
            if text.get("hf_tokenizer_name"):
                return HFTokenizer(str(folder), context_length=text["context_length"])
    except Exception as err:  # the file is missing or broken, or cannot be downloaded
        raise ModelError(
            f"the tokenizer of {architecture.name} cannot be loaded: {brief(err)}"
        ) from err
    say(f"{folder} holds no tokenizer: using CLIP's")
    return SimpleTokenizer(context_length=text["context_length"])


def check_tokenizer(architecture: Architecture, model: Any, tokenizer: Any) -> None:
    """Raise ModelError where the text tower cannot embed all of the tokenizer's ids."""
    name = architecture.name
    if transformers_text.has_tower(architecture.config["text_cfg"]):
        transformers_text.check_tower(name, model, tokenizer)
        return
    rows = getattr(model, "text", model).vocab_size
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name} has {rows} text tokens, its tokenizer {tokenizer.vocab_size}: name the right "
            "one in text_cfg, as tokenizer_kwargs.bpe_path or hf_tokenizer_name"
        )
