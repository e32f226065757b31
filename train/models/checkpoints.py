"""Models in PyTorch: from a name or a folder, with weights from any file that holds no code."""

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
    Blueprint,
    build_model,
    check_vocabulary,
    find_blueprint,
    load_tokenizer,
)
from train.models.weight_files import (
    INDEX,
    StateDict,
    Weights,
    join_sha256,
    read_weights,
    some,
    split_key,
)
from train.progress import brief, quiet, say, step

RANDOM = "random"
# Weights in a model's folder, the preferred ones first: open_clip's, then transformers'.
WEIGHTS = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, "model.safetensors", "pytorch_model.bin")
# Words (runs of letters) in the names of files whose weights were mostly trained with QuickGELU.
QUICK_GELU_NAMES = ("openai", "quickgelu", "metaclip", "dfn")


@dataclass(frozen=True)
class Visual:
    """Weights of the image tower alone that were put over those of a whole model."""

    label: str  # the file's name
    sha256: str
    base_sha256: str  # of the whole model's weights


@dataclass(frozen=True)
class Source:
    """A model in PyTorch (float32, in evaluation mode) and where it came from."""

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    tokenizer: Any  # open_clip's SimpleTokenizer or HFTokenizer
    name: str
    pretrained: str
    weights_sha256: str  # of the file, or of several hashes: see docs/checkpoints.md
    config: dict[str, Any]  # open_clip_config.json of a folder that holds this model
    wording: Mapping[str, Any] = field(default_factory=dict)  # the folder's "edgeclip" object
    folder: Path | None = None  # where it was loaded from, if from a folder
    visual: Visual | None = None

    @property
    def quick_gelu(self) -> bool:
        return bool(self.config["model_cfg"]["quick_gelu"])

    @property
    def title(self) -> str:
        """The model's name and weights, as a description."""
        tower = f", image encoder {self.visual.label}" if self.visual else ""
        return f"{self.name}, weights {self.pretrained}{tower}"

    @property
    def record(self) -> dict[str, str]:
        """The "source" of a bundle's manifest."""
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
    """Load the model that the command line names.

    `model` is a name of open_clip's, or a folder with weights and open_clip_config.json or
    transformers' config.json. `pretrained` is a tag of open_clip's, "random", or a file as FILE or
    FILE#KEY (see train.models.weight_files). `visual` is a file of weights for the image tower that
    replace those of `pretrained`. `quick_gelu` None builds with the activation that the weights were
    trained with, as far as that is known, and prints what was assumed. Raises ModelError.
    """
    blueprint = find_blueprint(model)
    if blueprint.config["text_cfg"].get("hf_model_name"):
        raise ModelError(
            f"{blueprint.name} has a text tower of Hugging Face's, which is not supported yet"
        )
    weights = _weights(blueprint, pretrained)
    tower = _visual(visual) if visual else None
    tokenizer = load_tokenizer(blueprint)
    if quick_gelu is None:
        quick_gelu = _activation(blueprint, weights, own=pretrained is None)
        if tower and tower.quick_gelu not in (None, quick_gelu):
            say(
                f"{tower.label} was trained with {_gelu(not quick_gelu)}, the base weights with "
                f"{_gelu(quick_gelu)}: building {blueprint.name} with the latter; see --quickgelu"
            )
    with step(f"building {blueprint.name}"):
        network = build_model(blueprint, quick_gelu, weights.preprocess if weights else None)
    check_vocabulary(blueprint.name, network, tokenizer)
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
        blueprint.name,
        pretrained=label,
        weights_sha256=join_sha256([base, tower.sha256]) if tower else base,
        config={
            "model_cfg": blueprint.config | {"quick_gelu": quick_gelu},
            "preprocess_cfg": network.visual.preprocess_cfg,
        },
        wording=blueprint.wording,
        folder=blueprint.folder,
        visual=Visual(tower.label, tower.sha256, base) if tower else None,
    )


def _weights(blueprint: Blueprint, pretrained: str | None) -> Weights | None:
    """Read the weights of a whole model; None leaves it random, with seed 0."""
    if pretrained == RANDOM:
        return None
    if pretrained and split_key(pretrained)[0].is_file():
        return _read(pretrained)
    if blueprint.folder:
        if pretrained:
            raise ModelError(
                f"{pretrained} does not exist: for a folder, --pretrained names a file"
            )
        return _read(str(_weights_in(blueprint.folder)))
    return _tagged(blueprint.name, pretrained)


def _tagged(name: str, pretrained: str | None) -> Weights:
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


def _visual(place: str) -> Weights:
    if not split_key(place)[0].is_file():
        raise ModelError(f"{place} does not exist: --visual names a file")
    return _read(place, "visual")


def _read(place: str, part: str = "model") -> Weights:
    with step(f"reading {split_key(place)[0].name}"):
        return read_weights(place, part)


def _weights_in(folder: Path) -> Path:
    for name in (*WEIGHTS, *(f"{name}{INDEX}" for name in WEIGHTS)):
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} holds no {HF_SAFE_WEIGHTS_NAME}: name a file with --pretrained")


def _download(name: str, tag: str, config: dict[str, Any]) -> Path:
    try:
        say(f"fetching the weights {tag!r} of {name} ...")  # the download draws its own progress
        with quiet():
            return Path(open_clip.download_pretrained(config))
    except Exception as err:  # any library of the chain, from urllib to huggingface_hub
        raise ModelError(f"cannot fetch the weights {tag!r} of {name}: {brief(err)}") from err


def _gelu(quick: bool) -> str:
    return "QuickGELU" if quick else "GELU"


def _activation(blueprint: Blueprint, weights: Weights | None, own: bool) -> bool:
    """Return whether to build with QuickGELU, which no tensor shows, and print what was assumed.

    own: the weights lie in the model's folder, whose configuration is theirs.
    """
    if "quick_gelu" in blueprint.config:
        return bool(blueprint.config["quick_gelu"])
    if weights is None:
        return False
    if weights.quick_gelu:
        say(f"the weights were trained with QuickGELU: building {blueprint.name} with it")
    if weights.quick_gelu is not None or own:
        return bool(weights.quick_gelu)
    words = re.findall("[a-z]+", weights.label.lower())
    hint = next((name for name in QUICK_GELU_NAMES if name in words), "")
    if hint:
        say(
            f"assuming QuickGELU, for {hint!r} in the name of {weights.label}: --no-quickgelu if it "
            "was trained with GELU"
        )
    else:
        say(
            f"assuming GELU, which {blueprint.name} has: --quickgelu if {weights.label} was trained "
            "with QuickGELU, as OpenAI's weights and those fine-tuned from them"
        )
    return bool(hint)


def fit_weights(model: Any, state: StateDict, origin: str, part: str = "") -> None:
    """Load `state` into `model`, whatever its precision; `part` is a prefix of the keys it has to hold.

    Raises ModelError that names some of the keys that are missing, unknown, of another shape, or
    not finite.
    """
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    wanted = {key: value for key, value in model.state_dict().items() if key.startswith(part)}
    for key in ("logit_scale", "logit_bias"):  # a scalar in some checkpoints, (1,) in others
        if key in state and key in wanted and state[key].numel() == 1:
            state[key] = state[key].reshape(wanted[key].shape)
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):  # only training reads it
            state[key] = wanted[key]
    shapes = {key: tuple(state[key].shape) for key in wanted.keys() & state.keys()}
    misshapen = [
        f"{key} is {shape}, not {tuple(wanted[key].shape)}"
        for key, shape in shapes.items()
        if shape != wanted[key].shape
    ]
    complaints = {
        "missing: ": wanted.keys() - state.keys(),
        "unknown: ": state.keys() - wanted.keys(),
        "of another shape: ": misshapen,
    }
    if any(complaints.values()):
        listed = (text + some(sorted(keys)) for text, keys in complaints.items() if keys)
        what = f"this model's {'image tower' if part else 'weights'}"
        raise ModelError(f"{origin} does not hold {what}; {'; '.join(listed)}")
    broken = [key for key in sorted(state) if not state[key].isfinite().all()]
    if broken:
        raise ModelError(f"{origin} holds infinite values or NaN, in {some(broken)}")
    model.load_state_dict(state, strict=False)


def _check_scale(model: Any, origin: str) -> None:
    """Raise ModelError where the logit scale is zero or infinite in float32."""
    scale = model.logit_scale.exp().item()
    if not 0 < scale < float("inf"):
        raise ModelError(
            f"{origin} has the logit scale {scale:g}, exp({model.logit_scale.item():g}): no model "
            "answers with that"
        )


def state_sha256(state: StateDict) -> str:
    """Return the SHA-256 of the tensors' bytes, in order of their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(state[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
