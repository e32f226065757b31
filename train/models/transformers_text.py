"""Text towers of Hugging Face transformers in open_clip's models (text_cfg.hf_model_name).

A model's folder holds their files, without weights, in a folder of its own:

FOLDER/open_clip_config.json   text_cfg names the folder text
FOLDER/text/config.json        transformers' configuration of the tower
FOLDER/text/tokenizer.json ... transformers' tokenizer

Other names are those of transformers' hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from open_clip.hf_configs import arch_dict
from open_clip.tokenizer import HFTokenizer

from train.errors import ModelError
from train.progress import brief, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FOLDER = "text"
POSITION_IDS = "text.transformer.embeddings.position_ids"  # weights of transformers before 4.31

TextConfig = Mapping[str, Any]  # open_clip's text_cfg


def has_tower(text: TextConfig) -> bool:
    """Tell whether the text tower comes from transformers."""
    return bool(text.get("hf_model_name"))


def build_settings(text: TextConfig, folder: Path | None) -> dict[str, Any]:
    """Return text_cfg to build a tower without its weights, with a path in place of a folder's name.

    No code of the tower's files is run. Raises ModelError for a type that open_clip does not build.
    """
    try:
        from transformers import PretrainedConfig
    except ImportError as err:
        raise ModelError(f"{err}: its text tower needs pip install 'edgeclip[export]'") from err
    name = text["hf_model_name"]
    if folder and _is_inside(folder, name):
        name = str(folder / name)
    config, _ = PretrainedConfig.get_config_dict(name)
    kind = config.get("model_type")
    if kind not in arch_dict:
        raise ModelError(f"open_clip has no text tower {kind!r}, but {', '.join(arch_dict)}")
    return dict(text) | {"hf_model_name": name, "hf_model_pretrained": False}


def tokenizer_settings(text: TextConfig, folder: Path | None) -> dict[str, Any]:
    """Return open_clip's arguments for a tokenizer from transformers, which run no code of its files.

    Of a model in a folder, open_clip looks for the tokenizer in the folder itself.
    """
    name = text.get("hf_tokenizer_name")
    if not name:
        return {}
    inner = {"subfolder": name} if folder and _is_inside(folder, name) else {}
    return {"trust_remote_code": False} | inner


def _is_inside(folder: Path, name: str) -> bool:
    """Tell whether a model's folder holds the named one; otherwise it is a name of the hub."""
    found = (folder / name).is_dir()
    if name == FOLDER and not found:
        raise ModelError(f"{folder} lacks the folder {FOLDER}, with config.json and tokenizer.json")
    return found


def run_settings(text: TextConfig) -> dict[str, Any]:
    """Return text_cfg of a folder in which `save` has written the tower and the tokenizer."""
    names: dict[str, Any] = {"hf_model_name": FOLDER, "hf_model_pretrained": False}
    if text.get("hf_tokenizer_name"):
        inner = {"subfolder": FOLDER}  # open_clip's own loader needs it
        names["hf_tokenizer_name"] = FOLDER
        names["tokenizer_kwargs"] = dict(text.get("tokenizer_kwargs") or {}) | inner
    return dict(text) | names


def save(folder: Path, config: PretrainedConfig, tokenizer: Any) -> None:
    """Write the tower's configuration and its tokenizer into `folder`/text.

    tokenizer: open_clip's; one that is not from transformers is left out.
    """
    with quiet():
        config.save_pretrained(folder / FOLDER)
        if isinstance(tokenizer, HFTokenizer):
            tokenizer.save_pretrained(folder / FOLDER)


@torch.no_grad()
def check_tower(name: str, model: Any, tokenizer: Any) -> None:
    """Raise ModelError unless the tower encodes a prompt of the tokenizer's full length and ids."""
    tower, length = model.text, tokenizer.context_length
    rows = tower.config.vocab_size
    if isinstance(tokenizer, HFTokenizer) and tokenizer.tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name} has {rows} text tokens, its tokenizer {tokenizer.tokenizer.vocab_size}: name "
            "the right one in text_cfg.hf_tokenizer_name"
        )
    pad = tower.config.pad_token_id
    if pad is None:
        raise ModelError(f"{name} has a text tower without pad_token_id, which open_clip needs")
    try:
        tower(torch.full((1, length), (pad + 1) % rows))
    except Exception as err:  # too few positions, or a pooler of open_clip's that fails
        raise ModelError(
            f"{name} cannot encode a text of {length} tokens ({brief(err)}): see context_length and "
            "hf_pooler_type in its text_cfg"
        ) from err
