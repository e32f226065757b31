"""Models in PyTorch: from a name or a folder, with weights from any file that holds no code."""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file

from edgeclip.storage import sha256
from export import ExportError
from export.progress import brief, quiet, say, step

CONFIG = "open_clip_config.json"
RANDOM = "random"
# What a TorchScript archive of OpenAI's holds besides weights, and what its state dict keeps.
OPENAI_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A model in PyTorch (float32, in evaluation mode) and where it came from."""

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    tokenizer: Any  # open_clip's SimpleTokenizer or HFTokenizer
    name: str
    pretrained: str
    weights_sha256: str  # of the file; of the tensors in order of their names where there is none
    config: dict[str, Any]  # open_clip_config.json of a folder that holds this model
    wording: Mapping[str, Any] = field(default_factory=dict)  # the folder's "edgeclip" object
    folder: Path | None = None  # where it was loaded from, if from a folder


def load(model: str, pretrained: str | None, *, quick_gelu: bool = False) -> Source:
    """The model that the command line names.

    `model` is a name of open_clip's or a folder with open_clip_config.json and weights;
    `pretrained` is a tag of open_clip's, a file, or "random". Raises ExportError.
    """
    folder = Path(model)
    if (folder / CONFIG).is_file():
        return _from_folder(folder, pretrained, quick_gelu)
    name = model.replace("/", "-")
    if name in open_clip.list_models():
        return _from_name(name, pretrained, quick_gelu)
    if folder.is_dir():
        raise ExportError(f"{folder} holds no {CONFIG}: it is not the folder of a model")
    close = difflib.get_close_matches(name, open_clip.list_models(), n=5)
    hint = f"did you mean {', '.join(close)}?" if close else "see open_clip.list_models()"
    raise ExportError(f"unknown model {model!r}: {hint}")


def _from_name(name: str, pretrained: str | None, quick_gelu: bool) -> Source:
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = f"{name} has the tags {', '.join(tags)}" if tags else f"{name} has no tags"
    if pretrained is None:
        raise ExportError(f"--pretrained is missing: a tag, a file or {RANDOM!r}; {known}")
    config = open_clip.get_model_config(name)
    if pretrained == RANDOM:
        return _assemble(name, name, config, None, RANDOM, quick_gelu)
    if Path(pretrained).is_file():
        return _assemble(name, name, config, Path(pretrained), Path(pretrained).name, quick_gelu)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        raise ExportError(f"{pretrained!r} is neither a file nor a tag: {known}")
    path = _download(name, pretrained, tag)
    return _assemble(name, name, config, path, pretrained, quick_gelu, tag)


def _from_folder(folder: Path, pretrained: str | None, quick_gelu: bool) -> Source:
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
        raise ExportError(f"{folder / CONFIG} is no configuration of open_clip's: {err!r}") from err
    path = Path(pretrained) if pretrained else _weights_in(folder)
    name = folder.resolve().name
    if pretrained == RANDOM:
        path = None
    elif not path.is_file():
        raise ExportError(f"{path} does not exist: for a folder, --pretrained names a file")
    label = RANDOM if path is None else path.name
    return _assemble(f"local-dir:{folder}", name, config, path, label, quick_gelu, wording=wording)


def _weights_in(folder: Path) -> Path:
    for name in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        if (folder / name).is_file():
            return folder / name
    raise ExportError(f"{folder} holds no {HF_SAFE_WEIGHTS_NAME}: name a file with --pretrained")


def _download(name: str, tag: str, config: dict[str, Any]) -> Path:
    try:
        say(f"fetching the weights {tag!r} of {name} ...")  # the download draws its own progress
        with quiet():
            return Path(open_clip.download_pretrained(config))
    except Exception as err:  # any library of the chain, from urllib to huggingface_hub
        raise ExportError(f"cannot fetch the weights {tag!r} of {name}: {brief(err)}") from err


def _assemble(
    identifier: str,
    name: str,
    config: dict[str, Any],
    path: Path | None,
    pretrained: str,
    quick_gelu: bool,
    tag: Mapping[str, Any] | None = None,
    wording: Mapping[str, Any] | None = None,
) -> Source:
    """Build the model of `config`, and load `path` into it; None leaves it random, with seed 0."""
    if config["text_cfg"].get("hf_model_name"):
        raise ExportError(f"{name} has a text tower of Hugging Face's, which is not supported yet")
    tokenizer = _tokenizer(identifier, name, config)
    state: StateDict = {}
    if path is not None:
        with step(f"reading {path.name}"):
            state, openai = read_weights(path)
            digest = sha256(path)
        openai = openai or bool((tag or {}).get("quick_gelu"))
        quick_gelu = _activation(name, config, state, openai, quick_gelu)
    with step(f"building {name}"):
        model = _build(identifier, name, quick_gelu, tag or {})
    _check_vocabulary(name, model, tokenizer)
    if path is None:
        digest = state_sha256(model.state_dict())
    else:
        fit_weights(model, state, path.name)
    settings = config | ({"quick_gelu": True} if quick_gelu else {})
    whole = {"model_cfg": settings, "preprocess_cfg": model.visual.preprocess_cfg}
    folder = _folder(identifier)
    return Source(model, tokenizer, name, pretrained, digest, whole, wording or {}, folder)


def _activation(
    name: str, config: dict[str, Any], state: StateDict, openai: bool, quick_gelu: bool
) -> bool:
    """Whether to build with QuickGELU, which no weights show: say so where it is not the model's."""
    if config.get("quick_gelu") or quick_gelu:
        return True
    if openai:
        say(f"the weights were trained with QuickGELU: building {name} with it")
    elif {torch.float16, torch.float32} <= {value.dtype for value in state.values()}:
        say(
            "the weights are partly float16: if they are OpenAI's, export them with --quickgelu, "
            f"or name the model {name}-quickgelu"
        )
    return openai


def _build(identifier: str, name: str, quick_gelu: bool, tag: Mapping[str, Any]) -> Any:
    keys = ("mean", "std", "interpolation", "resize_mode")
    torch.manual_seed(0)
    try:
        with quiet():
            model = open_clip.create_model(
                identifier,
                load_weights=False,
                force_quick_gelu=quick_gelu,
                force_preprocess_cfg={key: tag[key] for key in keys if key in tag},
            )
    except Exception as err:  # whatever a wrong entry of a configuration leads to
        raise ExportError(f"{name} cannot be built: {brief(err)}") from err
    return model.eval().requires_grad_(False)


def _folder(identifier: str) -> Path | None:
    prefix = "local-dir:"
    return Path(identifier.removeprefix(prefix)) if identifier.startswith(prefix) else None


def _tokenizer(identifier: str, name: str, config: dict[str, Any]) -> Any:
    settings = {}
    relative = (config["text_cfg"].get("tokenizer_kwargs") or {}).get("bpe_path")
    folder = _folder(identifier)
    if relative and folder:
        settings["bpe_path"] = str(folder / relative)
    try:
        with quiet():
            return open_clip.get_tokenizer(identifier, **settings)
    except Exception as err:  # a file that is missing or broken, or that cannot be fetched
        raise ExportError(f"the tokenizer of {name} cannot be loaded: {brief(err)}") from err


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Raises ExportError where open_clip's tokenizer has ids that the text tower does not know."""
    rows = getattr(model, "text", model).vocab_size
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size > rows:
        raise ExportError(
            f"{name} has {rows} text tokens, its tokenizer {tokenizer.vocab_size}: name the right "
            "one in text_cfg, as tokenizer_kwargs.bpe_path or hf_tokenizer_name"
        )


def read_weights(path: Path) -> tuple[StateDict, bool]:
    """The tensors of a file by name, and whether they are known to be OpenAI's; see `read_file`."""
    return _unwrapped(read_file(path), path)


def read_file(path: Path) -> Any:
    """What a file holds: safetensors, TorchScript archives and what torch.save wrote.

    No Python code in them is run; a TorchScript archive may run TorchScript of its own, so open only
    those whose origin you trust. Raises ExportError for any other file.
    """
    try:
        with quiet():  # torch.jit.load is deprecated, and the only reader of OpenAI's archives
            if path.suffix == ".safetensors":
                return load_file(path)
            if _is_torchscript(path):
                return torch.jit.load(path, map_location="cpu").state_dict()
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:  # its own text says how to run the code after all
        raise ExportError(
            f"{path} holds pickled code, which is not run, or is no checkpoint of PyTorch's: "
            "save the state dict alone"
        ) from err
    except Exception as err:  # on a broken file the readers raise anything, IndexError included
        raise ExportError(f"{path} is not a checkpoint that can be read: {brief(err)}") from err


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unwrapped(found: Any, path: Path) -> tuple[StateDict, bool]:
    """A plain state dict out of a training checkpoint's, and whether OpenAI's marks were in it."""
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise ExportError(f"{path} holds no state dict")
    if all(key.startswith("module.") for key in found):
        found = {key.removeprefix("module."): value for key, value in found.items()}
    openai = found.keys() >= OPENAI_MARKS
    state = {key: value for key, value in found.items() if key not in OPENAI_MARKS}
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ExportError(f"{path} holds no state dict: some of its values are not tensors")
    return state, openai


def fit_weights(model: Any, state: StateDict, origin: str) -> None:
    """Load `state` into `model`, whatever its precision.

    Raises ExportError that names some of the keys that are missing, unknown, or of another shape.
    """
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    wanted = model.state_dict()
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
    complaints = [
        _some("missing: ", wanted.keys() - state.keys()),
        _some("unknown: ", state.keys() - wanted.keys()),
        _some("of another shape: ", misshapen),
    ]
    if any(complaints):
        raise ExportError(
            f"{origin} does not hold this model's weights; " + "; ".join(filter(None, complaints))
        )
    model.load_state_dict(state)


def _some(what: str, keys: Any, limit: int = 3) -> str:
    names = sorted(keys)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return what + ", ".join(names[:limit]) + rest if names else ""


def state_sha256(state: StateDict) -> str:
    """The SHA-256 of the tensors' bytes, in order of their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(state[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
