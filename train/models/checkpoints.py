"""Models in PyTorch, loaded by name or from a folder, with weights from any file."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict

from train.errors import ModelError
from train.models.architectures import (
    Architecture,
    build_model,
    check_tokenizer,
    find_architecture,
    load_tokenizer,
)
from train.models.transformers_text import POSITION_IDS, has_tower, run_settings
from train.models.weight_files import (
    INDEX,
    StateDict,
    Weights,
    describe_mismatch,
    join_names,
    join_sha256,
    read_weights,
    split_key,
)
from train.progress import brief, quiet, say, step

RANDOM = "random"
# Weight files of a model's folder, preferred first: open_clip's, then transformers'.
WEIGHTS: tuple[str, ...] = (
    HF_SAFE_WEIGHTS_NAME,
    HF_WEIGHTS_NAME,
    "model.safetensors",
    "pytorch_model.bin",
)
# Words (runs of letters) in the names of files whose weights were mostly trained with QuickGELU.
QUICK_GELU_NAMES = ("openai", "quickgelu", "metaclip", "dfn")


@dataclass(frozen=True)
class VisualWeights:
    """Origin of image tower weights loaded over a model's."""

    label: str  # the file's name
    sha256: str
    base_sha256: str  # of the whole model's weights


@dataclass(frozen=True)
class Source:
    """Model in PyTorch (float32, in evaluation mode) and its origin."""

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    tokenizer: Any  # open_clip's SimpleTokenizer or HFTokenizer
    name: str
    pretrained: str
    weights_sha256: str  # of the file, or of several hashes: see docs/checkpoints.md
    config: dict[str, Any]  # open_clip_config.json of a folder that holds this model
    wording: Mapping[str, Any] = field(default_factory=dict)  # the folder's "edgeclip" object
    folder: Path | None = None  # the model's folder, if loaded from one
    visual: VisualWeights | None = None

    @property
    def quick_gelu(self) -> bool:
        return bool(self.config["model_cfg"]["quick_gelu"])

    @property
    def title(self) -> str:
        """Return a description: the model's name and weights."""
        tower = f", image encoder {self.visual.label}" if self.visual else ""
        return f"{self.name}, weights {self.pretrained}{tower}"

    @property
    def record(self) -> dict[str, str]:
        """Return the "source" object of a bundle's manifest."""
        record = {
            "model": self.name,
            "pretrained": self.pretrained,
            "weights_sha256": self.weights_sha256,
        }
        if self.visual:
            record["base_sha256"] = self.visual.base_sha256
            record["visual"] = self.visual.label
            record["visual_sha256"] = self.visual.sha256
        return record


def load(
    model: str,
    pretrained: str | None,
    *,
    visual: str | None = None,
    quick_gelu: bool | None = None,
) -> Source:
    """Load a model and its weights.

    model: an open_clip name, or a folder with weights and open_clip_config.json or transformers'
    config.json.
    pretrained: an open_clip tag, "random", or a file as FILE or FILE#KEY (see
    train.models.weight_files); None takes the folder's weights.
    visual: a file of image tower weights, loaded over those of `pretrained`.
    quick_gelu: the activation; None takes the one that the weights were trained with, as far as it
    is known, and prints any assumption.
    Raises ModelError.
    """
    architecture = find_architecture(model)
    name = architecture.name
    weights = _load_weights(architecture, pretrained)
    tower = _load_visual(visual) if visual else None
    tokenizer = load_tokenizer(architecture)
    if quick_gelu is None:
        quick_gelu = _choose_activation(architecture, weights, in_folder=pretrained is None)
        _warn_other_activation(name, tower, quick_gelu)
    with step(f"building {name}"):
        network = build_model(architecture, quick_gelu, weights.preprocess if weights else None)
    check_tokenizer(architecture, network, tokenizer)
    if weights:
        fit_weights(network, weights.state, weights.label)
    label = weights.label if weights else RANDOM
    _check_scale(network, label)
    base = weights.sha256 if weights else state_sha256(network.state_dict())
    if tower:
        fit_weights(network, tower.state, tower.label, "visual.")
    return Source(
        network,
        tokenizer,
        name,
        pretrained=label,
        weights_sha256=join_sha256([base, tower.sha256]) if tower else base,
        config={
            "model_cfg": _run_config(architecture) | {"quick_gelu": quick_gelu},
            "preprocess_cfg": network.visual.preprocess_cfg,
        },
        wording=architecture.wording,
        folder=architecture.folder,
        visual=VisualWeights(tower.label, tower.sha256, base) if tower else None,
    )


def _run_config(architecture: Architecture) -> dict[str, Any]:
    """Return the model_cfg of a folder that holds this model."""
    config = architecture.config
    text = config["text_cfg"]
    return config | {"text_cfg": run_settings(text)} if has_tower(text) else config


def _load_weights(architecture: Architecture, pretrained: str | None) -> Weights | None:
    """Load the weights of the whole model; None stands for random ones."""
    if pretrained == RANDOM:
        return None
    if pretrained and split_key(pretrained)[0].is_file():
        return _read(pretrained)
    if architecture.folder:
        if pretrained:
            raise ModelError(
                f"{pretrained} does not exist: for a folder, --pretrained names a file"
            )
        return _read(str(_find_weights(architecture.folder)))
    return _load_tag(architecture.name, pretrained)


def _load_tag(name: str, pretrained: str | None) -> Weights:
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = f"{name} has the tags {', '.join(tags)}" if tags else f"{name} has no tags"
    if pretrained is None:
        raise ModelError(f"--pretrained is missing: a tag, a file or {RANDOM!r}; {known}")
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        raise ModelError(f"{pretrained!r} is neither a file nor a tag: {known}")
    keys = ("mean", "std", "interpolation", "resize_mode")
    weights = _read(str(_download(name, pretrained, tag)))
    return dataclasses.replace(
        weights,
        label=pretrained,
        quick_gelu=weights.quick_gelu or bool(tag.get("quick_gelu")),
        preprocess={key: tag[key] for key in keys if key in tag},
    )


def _load_visual(location: str) -> Weights:
    if not split_key(location)[0].is_file():
        raise ModelError(f"{location} does not exist: --visual names a file")
    return _read(location, "visual")


def _read(location: str, part: str = "model") -> Weights:
    with step(f"reading {split_key(location)[0].name}"):
        return read_weights(location, part)


def _find_weights(folder: Path) -> Path:
    for name in (*WEIGHTS, *(f"{name}{INDEX}" for name in WEIGHTS)):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} holds no {HF_SAFE_WEIGHTS_NAME}: name a file with --pretrained")


def _download(name: str, tag: str, config: dict[str, Any]) -> Path:
    try:
        # Not a `step`: the download has its own progress bar.
        say(f"downloading the weights {tag!r} of {name} ...")
        with quiet():
            return Path(open_clip.download_pretrained(config))
    except Exception as err:  # urllib, huggingface_hub and others raise errors of their own
        raise ModelError(f"cannot download the weights {tag!r} of {name}: {brief(err)}") from err


def _choose_activation(
    architecture: Architecture, weights: Weights | None, in_folder: bool
) -> bool:
    """Return whether to build with QuickGELU, and print any assumption; no tensor shows it.

    in_folder: the weights lie in the model's folder, so its configuration applies to them.
    """
    name = architecture.name
    if "quick_gelu" in architecture.config:
        return bool(architecture.config["quick_gelu"])
    if weights is None:
        return False
    if weights.quick_gelu:
        say(f"the weights were trained with QuickGELU: building {name} with it")
    if weights.quick_gelu is not None or in_folder:
        return bool(weights.quick_gelu)
    words = re.findall("[a-z]+", weights.label.lower())
    hint = next((word for word in QUICK_GELU_NAMES if word in words), "")
    if hint:
        say(
            f"assuming QuickGELU, for {hint!r} in the name of {weights.label}: --no-quickgelu if it "
            "was trained with GELU"
        )
    else:
        say(
            f"assuming GELU, which {name} has: --quickgelu if {weights.label} was trained with "
            "QuickGELU, as OpenAI's weights and those fine-tuned from them"
        )
    return bool(hint)


def _warn_other_activation(name: str, tower: Weights | None, quick_gelu: bool) -> None:
    """Print a warning where the image tower was trained with the other activation."""
    if tower and tower.quick_gelu not in (None, quick_gelu):
        base, other = ("QuickGELU", "GELU") if quick_gelu else ("GELU", "QuickGELU")
        say(
            f"{tower.label} was trained with {other}, the base weights with {base}: building {name} "
            f"with {base}; --quickgelu or --no-quickgelu overrides it"
        )


def fit_weights(model: Any, state: StateDict, origin: str, prefix: str = "") -> None:
    """Load `state` of any floating-point dtype into the keys of `model` that start with `prefix`.

    Raises ModelError that names keys which are missing, unknown, of the wrong shape or not finite.
    """
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    for key in ("logit_scale", "logit_bias"):  # a scalar in some checkpoints, (1,) in others
        if key in state and key in expected and state[key].numel() == 1:
            state[key] = state[key].reshape(expected[key].shape)
    for key in expected.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # only training reads it
            state[key] = expected[key]
    if POSITION_IDS not in expected:
        state.pop(POSITION_IDS, None)
    mismatch = describe_mismatch(state, expected)
    if mismatch:
        part = "image tower" if prefix else "weights"
        raise ModelError(f"{origin} does not hold this model's {part}; {mismatch}")
    broken = [key for key in sorted(state) if not state[key].isfinite().all()]
    if broken:
        raise ModelError(f"{origin} holds infinite values or NaN, in {join_names(broken)}")
    model.load_state_dict(state, strict=False)


def _check_scale(model: Any, origin: str) -> None:
    """Raise ModelError where the logit scale is zero or infinite in float32."""
    scale = model.logit_scale.exp().item()
    if not 0 < scale < float("inf"):
        raise ModelError(
            f"{origin} has the logit scale {scale:g}, exp({model.logit_scale.item():g}): it must be "
            "positive and finite"
        )


def state_sha256(state: StateDict) -> str:
    """Return the SHA-256 of the tensors' bytes in order of their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(state[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
