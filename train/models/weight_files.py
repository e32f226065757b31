"""Weight files: safetensors, PyTorch checkpoints, TorchScript archives and shards.

A checkpoint may wrap its state dict in dictionaries and key prefixes; they are removed. No Python
code in a file is run. A TorchScript archive may run TorchScript, so open only archives whose origin
you trust.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from edgeclip.storage import sha256
from train.errors import ModelError
from train.models.transformers_clip import is_transformers, quick_gelu_beside, to_open_clip
from train.progress import brief, quiet, say

StateDict = dict[str, torch.Tensor]

# Buffers that identify the state dicts of OpenAI's TorchScript archives.
OPENAI_BUFFERS = frozenset({"input_resolution", "context_length", "vocab_size"})
# Keys that hold a state dict, and prefixes of its keys ("model" and "model."), preferred first.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "net", "clip", "vision_encoder_state_dict",
    "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema",
)  # fmt: skip
# Names that torch.compile, FSDP and activation checkpointing insert anywhere in a key.
INSERTED_NAMES = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
SHARD = re.compile(r"^(.*)-\d{5}-of-(\d{5})(\.\w+)$")
INDEX = ".index.json"
MAX_DEPTH = 6  # wrappers and prefixes around a state dict
MAX_HEADER = 100_000_000  # bytes, a limit of the safetensors library
PICKLE, ZIP, LFS = b"\x80", b"PK\x03\x04", b"version https://git-lfs"


class Ignored:
    """Placeholder for a pickled object beside the weights; discards its state.

    NumPy trusts the state in a pickle, and a forged one corrupts memory.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Classes of plain data in pickles, under the names of all Python and NumPy versions.
IGNORED_CLASSES = (
    "argparse.Namespace",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    ),
    "packaging.version.Version",  # in checkpoints of dalle2-pytorch, with the three below
    "packaging.version._Version",
    "packaging._structures.InfinityType",
    "packaging._structures.NegativeInfinityType",
)


@dataclass(frozen=True)
class Weights:
    """State dict with open_clip's key names, and its origin."""

    state: StateDict
    sha256: str  # of the file, of the files of a sharded checkpoint, or of file and key
    label: str  # name of the file, or the tag
    quick_gelu: bool | None = None  # trained with QuickGELU; None if unknown
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # settings of a tag


def split_key(location: str) -> tuple[Path, str]:
    """Split FILE#KEY, where KEY names one of the state dicts in FILE; without one, KEY is ""."""
    if "#" in location and not Path(location).exists():
        file, _, key = location.rpartition("#")
        return Path(file), key
    return Path(location), ""


def read_weights(location: str | Path, part: str = "model") -> Weights:
    """Read FILE or FILE#KEY; `part` is "model", or "visual" for the image tower alone.

    Prints the removed wrappers and the other state dicts of the file, if any. Raises ModelError.
    """
    path, key = split_key(str(location))
    files = checkpoint_files(path)
    candidate = _choose(read_file(path), path, key, part)
    state = {name: v for name, v in candidate.state.items() if name not in OPENAI_BUFFERS}
    quick_gelu = True if candidate.state.keys() >= OPENAI_BUFFERS else None
    if is_transformers(state):
        state, quick_gelu = to_open_clip(state), quick_gelu_beside(path)
    if part == "visual" and not any(name.startswith("visual.") for name in state):
        state = {f"visual.{name}": value for name, value in state.items()}
    digest = join_sha256([*map(sha256, files), *([key] if key else [])])
    return Weights(state, digest, f"{path.name}#{key}" if key else path.name, quick_gelu)


def join_sha256(digests: Sequence[str]) -> str:
    """Return the only digest, or the SHA-256 of several digests, one per line."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def checkpoint_files(path: Path) -> list[Path]:
    """Return `path`, followed by its shards if it is an index. Raises ModelError."""
    shard = SHARD.match(path.name)
    if shard and int(shard[2]) > 1:
        raise ModelError(
            f"{path} is one of {int(shard[2])} shards: name their index, {shard[1]}{shard[3]}{INDEX}"
        )
    if not path.name.endswith(INDEX):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside its folder")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as err:
        raise ModelError(f"{path} is no index of a sharded checkpoint: {brief(err)}") from err
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{path.parent} lacks {join_names(missing)}, of the shards that {path} lists"
        )
    return [path, *(path.parent / name for name in names)]


def read_file(path: Path) -> Any:
    """Load a safetensors file, a TorchScript archive, a torch.save file, or the shards of an index.

    Recognises the format by content. Raises ModelError for any other file.
    """
    if path.name.endswith(INDEX):
        merged: dict[str, Any] = {}
        for shard in checkpoint_files(path)[1:]:
            contents = read_file(shard)
            if not isinstance(contents, Mapping):
                raise ModelError(f"{shard} holds no state dict: {_describe(contents)}")
            merged |= contents
        return merged
    try:
        with (
            quiet(),
            torch.serialization.safe_globals([(Ignored, name) for name in IGNORED_CLASSES]),
        ):
            if _is_safetensors(path):
                return load_file(path)
            if _is_torchscript(path):
                return _read_torchscript(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError as err:  # torch's message explains how to run the code
        code = re.search(r"GLOBAL ([\w.]+)", str(err))
        problem = f"holds pickled code ({code[1]})" if code else "is damaged or holds pickled code"
        raise ModelError(f"{path} {problem}, which is not run: save the state dict alone") from err
    except Exception as err:  # a broken file can raise anything, IndexError included
        raise ModelError(f"{path} is not a checkpoint that can be read: {brief(err)}") from err


def _is_safetensors(path: Path) -> bool:
    """Tell by content. Raises ModelError for a misnamed file and for a Git LFS pointer."""
    with path.open("rb") as file:
        start = file.read(len(LFS))
    if start == LFS:
        raise ModelError(f"{path} is a pointer of Git LFS: fetch the weights with git lfs pull")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return True
    if path.suffix == ".safetensors":
        if start.startswith((PICKLE, ZIP)):
            raise ModelError(f"{path} is no safetensors but a PyTorch checkpoint: rename it to .pt")
        raise ModelError(f"{path} is not a checkpoint that can be read: it is no safetensors file")
    return False


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_torchscript(path: Path) -> StateDict:
    # torch.jit.load is deprecated, but nothing else reads these archives.
    module: torch.nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return module.state_dict()


@dataclass(frozen=True)
class Candidate:
    """State dict in a file, and its position there."""

    trail: tuple[str, ...]  # keys and prefixes that lead to it; prefixes end with a dot
    state: StateDict
    leftovers: tuple[str, ...]  # tensors beside it that it does not contain

    @property
    def names(self) -> list[str]:
        return [name.rstrip(".") for name in self.trail]

    @property
    def part(self) -> str:
        """Return "model", "visual" (an image tower alone), or "" for anything else."""
        keys = self.state.keys()
        image = _any_starts(keys, ("visual.", "vision_model.", "image_encoder."))
        text = _any_starts(keys, ("token_embedding.", "text.", "text_model.", "text_encoder."))
        if image and text:
            return "model"
        bare = _any_starts(keys, ("conv1.weight", "trunk.", "embeddings.patch_embedding."))
        return "visual" if (image or bare) and not text else ""


def _any_starts(keys: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _candidates(
    contents: Any,
    visited: set[int],
    trail: tuple[str, ...] = (),
    leftovers: tuple[str, ...] = (),
) -> Iterator[Candidate]:
    """Yield the state dicts below wrappers and prefixes, preferred ones first.

    visited: ids of the mappings already entered; none is entered twice. The mappings belong to the
    file's contents, so their ids stay valid during the search.
    """
    if not isinstance(contents, Mapping) or not contents or len(trail) > MAX_DEPTH:
        return
    mapping = {INSERTED_NAMES.sub("", k): v for k, v in contents.items() if isinstance(k, str)}
    tensors = {key: v for key, v in mapping.items() if isinstance(v, torch.Tensor)}
    plain = {key: v for key, v in tensors.items() if key.split(".")[0] not in WRAPPERS}
    candidate = Candidate(trail, plain, leftovers + tuple(tensors.keys() - plain.keys()))
    if candidate.part:
        yield candidate
    beside = leftovers if candidate.part else leftovers + tuple(plain)
    for name in WRAPPERS:
        inner = mapping.get(name)
        if id(inner) not in visited:
            visited.add(id(inner))
            yield from _candidates(inner, visited, (*trail, name))
        yield from _candidates(_under_prefix(tensors, name), visited, (*trail, f"{name}."), beside)
    if tensors and not candidate.part:
        yield Candidate(trail, tensors, leftovers)


def _under_prefix(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {key[len(prefix) :]: v for key, v in mapping.items() if key.startswith(prefix)}


def _choose(contents: Any, path: Path, key: str, part: str) -> Candidate:
    """Choose the state dict of `part`, and print its position. Raises ModelError."""
    candidates = list(_candidates(contents, {id(contents)}))
    if key:
        candidates = [c for c in candidates if key in c.names] or _candidates_at(contents, key)
    if not candidates:
        name = f" {key!r}" if key else ""
        raise ModelError(f"{path} holds no state dict{name}: {_describe(contents)}")
    fitting = [candidate for candidate in candidates if candidate.part == part]
    if not fitting:
        _refuse_other_part(path, part, candidates)
    chosen, *others = fitting or candidates[:1]
    _report_choice(path, chosen, others)
    return chosen


def _candidates_at(contents: Any, key: str) -> list[Candidate]:
    if not isinstance(contents, Mapping):
        return []
    mapping = {name: value for name, value in contents.items() if isinstance(name, str)}
    return list(_candidates(mapping.get(key, _under_prefix(mapping, key)), set(), (key,)))


def _refuse_other_part(path: Path, part: str, candidates: Sequence[Candidate]) -> None:
    """Raise ModelError where the file holds an image tower instead of a model, or vice versa."""
    if part == "model" and any(c.part == "visual" for c in candidates):
        raise ModelError(
            f"{path} holds an image tower alone: name it with --visual, and its base weights with "
            "--pretrained"
        )
    if part == "visual" and any(c.part == "model" for c in candidates):
        raise ModelError(f"{path} holds a whole model: name it with --pretrained, not --visual")


def _report_choice(path: Path, chosen: Candidate, others: Sequence[Candidate]) -> None:
    notes = []
    if chosen.trail:
        notes.append(f"taking {' > '.join(chosen.trail)}")
    if others:
        keys = sorted({_distinct_key(other, chosen) for other in others})
        notes.append(f"not {', '.join(keys)} (chosen by {path.name}#{keys[0]})")
    if chosen.leftovers:
        notes.append(f"leaving {join_names(sorted(chosen.leftovers))}")
    if notes:
        say(f"{path.name}: {', '.join(notes)}")


def _distinct_key(other: Candidate, chosen: Candidate) -> str:
    """Return a key that leads to `other` and not to `chosen`."""
    return next((name for name in other.names if name not in chosen.names), other.names[-1])


def _describe(contents: Any) -> str:
    if not isinstance(contents, Mapping):
        return f"it is a {type(contents).__name__}"
    if not contents:
        return "it is empty"
    keys = [f"{key} ({type(value).__name__})" for key, value in contents.items()]
    return f"its keys are {join_names(keys, limit=6)}; FILE#KEY chooses one"


def describe_mismatch(state: Mapping[str, torch.Tensor], expected: StateDict) -> str:
    """Name the keys of `state` that are missing, unknown or of the wrong shape; "" if all fit."""
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & state.keys())
        if state[key].shape != expected[key].shape
    ]
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "wrong shape": misshapen,
    }
    return "; ".join(f"{name}: {join_names(keys)}" for name, keys in problems.items() if keys)


def join_names(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names, and count the rest."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
