"""Models without their weights: by a name of open_clip's, or by a folder's configuration."""

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
from train.models import transformers_clip
from train.progress import brief, quiet, say

CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights."""

    name: str
    config: dict[str, Any]  # open_clip's model_cfg
    identifier: str = ""  # for open_clip's factory; "" for a folder of transformers'
    folder: Path | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # other than open_clip's defaults
    wording: Mapping[str, Any] = field(default_factory=dict)


def is_model_folder(folder: Path) -> bool:
    """Tell whether a folder describes a model."""
    return (folder / CONFIG).is_file() or transformers_clip.is_folder(folder)


def find_blueprint(model: str) -> Blueprint:
    """Find a folder's model, or open_clip's model of a name. Raises ModelError for anything else."""
    folder, name = Path(model), model.replace("/", "-")
    if (folder / CONFIG).is_file():
        return _from_folder(folder)
    if transformers_clip.is_folder(folder):
        return _from_transformers(folder)
    if name in open_clip.list_models():
        return Blueprint(name, open_clip.get_model_config(name), name)
    if (folder / transformers_clip.CONFIG).is_file():
        return _from_transformers(folder)  # which raises
    if folder.is_dir():
        raise ModelError(
            f"{folder} holds no {CONFIG} or {transformers_clip.CONFIG}: it is not the folder of a model"
        )
    close = difflib.get_close_matches(name, open_clip.list_models(), n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
    raise ModelError(f"unknown model {model!r}: {hint}")


def _from_folder(folder: Path) -> Blueprint:
    try:
        whole = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = whole["model_cfg"]
        wording = whole.get("edgeclip", {})
        if not all(
            isinstance(x, dict) for x in (config["vision_cfg"], config["text_cfg"], wording)
        ):
            raise TypeError("vision_cfg, text_cfg and edgeclip must be objects")
        for name in ("templates", "null_templates"):
            if not isinstance(wording.get(name, []), list):
                raise TypeError(f"{name} must be a list")
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ModelError(f"{folder / CONFIG} is no configuration of open_clip's: {err!r}") from err
    name = folder.resolve().name
    return Blueprint(name, config, f"local-dir:{folder}", folder, wording=wording)


def _from_transformers(folder: Path) -> Blueprint:
    try:
        config = transformers_clip.read_config(folder)
    except ImportError as err:
        raise ModelError(f"{err}: {folder} needs pip install 'edgeclip[export]'") from err
    preprocess = transformers_clip.read_preprocessing(folder, config["vision_cfg"]["image_size"])
    return Blueprint(folder.resolve().name, config, folder=folder, preprocess=preprocess)


def build_model(
    blueprint: Blueprint, quick_gelu: bool, preprocess: Mapping[str, Any] | None = None
) -> Any:
    """Build the model with random weights, always the same ones, in evaluation mode.

    preprocess: settings of the weights that go before the model's own. Raises ModelError.
    """
    torch.manual_seed(0)
    try:
        with quiet():
            if blueprint.identifier:
                model = open_clip.create_model(
                    blueprint.identifier,
                    load_weights=False,
                    force_preprocess_cfg=dict(preprocess or {}),
                    quick_gelu=quick_gelu,
                )
            else:
                model = CLIP(**blueprint.config | {"quick_gelu": quick_gelu})
                settings = dataclasses.asdict(PreprocessCfg()) | dict(blueprint.preprocess)
                set_model_preprocess_cfg(model, settings | {"size": model.visual.image_size})
    except Exception as err:  # whatever a wrong entry of a configuration leads to
        raise ModelError(f"{blueprint.name} cannot be built: {brief(err)}") from err
    return model.eval().requires_grad_(False)


def load_tokenizer(blueprint: Blueprint) -> Any:
    """Load the tokenizer in open_clip's form. Raises ModelError."""
    text, folder, settings = blueprint.config["text_cfg"], blueprint.folder, {}
    relative = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    if relative and folder:
        settings["bpe_path"] = str(folder / relative)
    try:
        with quiet():
            if blueprint.identifier:
                return open_clip.get_tokenizer(blueprint.identifier, **settings)
            if text.get("hf_tokenizer_name"):
                return HFTokenizer(str(folder), context_length=text["context_length"])
    except Exception as err:  # a file that is missing or broken, or that cannot be fetched
        raise ModelError(
            f"the tokenizer of {blueprint.name} cannot be loaded: {brief(err)}"
        ) from err
    say(f"{folder} holds no tokenizer: taking CLIP's own")
    return SimpleTokenizer(context_length=text["context_length"])


def check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError where open_clip's tokenizer has ids that the text tower does not know."""
    rows = getattr(model, "text", model).vocab_size
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name} has {rows} text tokens, its tokenizer {tokenizer.vocab_size}: name the right "
            "one in text_cfg, as tokenizer_kwargs.bpe_path or hf_tokenizer_name"
        )
