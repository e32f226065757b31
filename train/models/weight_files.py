"""Weights in files: a state dict, found among what training scripts save around it.

No Python code in a file is run. A TorchScript archive may run TorchScript of its own, so open only
those whose origin you trust.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
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

# Buffers of OpenAI's TorchScript archives, which their state dicts keep.
OPENAI_MARKS = frozenset({"input_resolution", "context_length", "vocab_size"})
# Keys around a state dict, and prefixes of its keys ("model" and "model."), the preferred ones first.
WRAPPERS = (
    "state_dict", "model_state_dict", "model", "module", "net", "clip", "vision_encoder_state_dict",
    "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema",
)  # fmt: skip
# Names that torch.compile, FSDP and activation checkpointing insert anywhere in a key.
INSERTED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
SHARD = re.compile(r"^(.*)-\d{5}-of-(\d{5})(\.\w+)$")
INDEX = ".index.json"
DEEPEST = 6  # wrappers and prefixes around a state dict
LARGEST_HEADER = 100_000_000  # bytes, a limit of the safetensors library
PICKLE, ZIP, LFS = b"\x80", b"PK\x03\x04", b"version https://git-lfs"


class Ignored:
    """Placeholder for an object beside the weights, in place of its class and its state.

    NumPy trusts the state in a pickle, and a forged one corrupts memory. None of it is used.
    """

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Names of plain data in pickles, whichever version of Python and NumPy wrote them.
IGNORED = (
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
    """A state dict by open_clip's names, and what its file tells of it."""

    state: StateDict
    sha256: str  # of the file, of the files of a sharded checkpoint, or of file and chosen key
    label: str  # the file's name or the tag
    quick_gelu: bool | None = None  # whether trained with QuickGELU, where known
    preprocess: Mapping[str, Any] = field(default_factory=dict)  # of a tag


def split_key(place: str) -> tuple[Path, str]:
    """Split FILE#KEY, where KEY chooses one of the state dicts in FILE; it may be missing."""
    if "#" in place and not Path(place).exists():
        file, _, key = place.rpartition("#")
        return Path(file), key
    return Path(place), ""


def read_weights(place: str | Path, part: str = "model") -> Weights:
    """Read FILE or FILE#KEY. `part`: the "model", or its "visual" tower alone.

    Prints which state dict was taken where there is something around it. Raises ModelError.
    """
    path, key = split_key(str(place))
    files = checkpoint_files(path)
    chosen = _choose(read_file(path), path, key, part)
    state = {name: v for name, v in chosen.state.items() if name not in OPENAI_MARKS}
    openai = chosen.state.keys() >= OPENAI_MARKS
    quick_gelu = True if openai else None
    if is_transformers(state):
        state, quick_gelu = to_open_clip(state), quick_gelu_beside(path)
    if part == "visual" and not any(name.startswith("visual.") for name in state):
        state = {f"visual.{name}": value for name, value in state.items()}
    digest = join_sha256([*map(sha256, files), *([key] if key else [])])
    return Weights(state, digest, f"{path.name}#{key}" if key else path.name, quick_gelu)


def join_sha256(digests: Sequence[str]) -> str:
    """Return a single digest as it is, and the SHA-256 of several, a line each."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def checkpoint_files(path: Path) -> list[Path]:
    """Return `path`, and with it the shards where it is an index. Raises ModelError."""
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
            raise ValueError("it names files outside of its folder")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as err:
        raise ModelError(f"{path} is no index of a sharded checkpoint: {brief(err)}") from err
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(f"{path.parent} lacks {some(missing)}, of the shards that {path} lists")
    return [path, *(path.parent / name for name in names)]


def read_file(path: Path) -> Any:
    """Load safetensors (known by content), a TorchScript archive, what torch.save wrote, or the
    shards of an index. Raises ModelError for any other file.
    """
    if path.name.endswith(INDEX):
        merged: dict[str, Any] = {}
        for shard in checkpoint_files(path)[1:]:
            found = read_file(shard)
            if not isinstance(found, Mapping):
                raise ModelError(f"{shard} holds no state dict: {_contents(found)}")
            merged |= found
        return merged
    try:
        with quiet(), torch.serialization.safe_globals([(Ignored, name) for name in IGNORED]):
            if _is_safetensors(path):
                return load_file(path)
            if _is_torchscript(path):  # torch.jit.load is deprecated, and the only reader of these
                return torch.jit.load(path, map_location="cpu").state_dict()
            return torch.load(path, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except pickle.UnpicklingError as err:  # its own text says how to run the code after all
        code = re.search(r"GLOBAL ([\w.]+)", str(err))
        held = f"holds pickled code ({code[1]})" if code else "is damaged or holds pickled code"
        raise ModelError(f"{path} {held}, which is not run: save the state dict alone") from err
    except Exception as err:  # on a broken file the readers raise anything, IndexError included
        raise ModelError(f"{path} is not a checkpoint that can be read: {brief(err)}") from err


def _is_safetensors(path: Path) -> bool:
    """Tell by content. Raises ModelError for a file called so that is none, or not fetched yet."""
    with path.open("rb") as file:
        start = file.read(len(LFS))
    if start == LFS:
        raise ModelError(f"{path} is a pointer of Git LFS: fetch the weights with git lfs pull")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER:
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


@dataclass(frozen=True)
class Candidate:
    """A state dict in a file: where it lies, and the tensors beside it that are not in it."""

    trail: tuple[str, ...]  # keys, and prefixes with their dot
    state: StateDict
    beside: tuple[str, ...]

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


def _any_starts(keys: Any, prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _candidates(
    found: Any, seen: set[int], trail: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> Iterator[Candidate]:
    """Find state dicts below wrappers and behind prefixes, the preferred ones first.

    seen: ids of the mappings entered, of which none is entered again. They are the file's own, which
    outlive the search.
    """
    if not isinstance(found, Mapping) or not found or len(trail) > DEEPEST:
        return
    found = {INSERTED.sub("", key): v for key, v in found.items() if isinstance(key, str)}
    tensors = {key: v for key, v in found.items() if isinstance(v, torch.Tensor)}
    plain = {key: v for key, v in tensors.items() if key.split(".")[0] not in WRAPPERS}
    own = Candidate(trail, plain, beside + tuple(tensors.keys() - plain.keys()))
    if own.part:
        yield own
    rest = beside if own.part else beside + tuple(plain)
    for name in WRAPPERS:
        inner = found.get(name)
        if id(inner) not in seen:
            seen.add(id(inner))
            yield from _candidates(inner, seen, (*trail, name))
        yield from _candidates(_behind(tensors, name), seen, (*trail, f"{name}."), rest)
    if tensors and not own.part:
        yield Candidate(trail, tensors, beside)


def _behind(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {key[len(prefix) :]: v for key, v in found.items() if key.startswith(prefix)}


def _choose(found: Any, path: Path, key: str, part: str) -> Candidate:
    """Return the state dict of `part`, and print where it was found. Raises ModelError."""
    candidates = list(_candidates(found, {id(found)}))
    if key:
        candidates = [c for c in candidates if key in c.names] or _below(found, key)
    if not candidates:
        raise ModelError(f"{path} holds no state dict{f' {key!r}' * bool(key)}: {_contents(found)}")
    fitting = [candidate for candidate in candidates if candidate.part == part]
    if not fitting and part == "model" and any(c.part == "visual" for c in candidates):
        raise ModelError(
            f"{path} holds an image tower alone: name it with --visual, and with --pretrained the "
            "weights that it was trained from"
        )
    if not fitting and part == "visual" and any(c.part == "model" for c in candidates):
        raise ModelError(f"{path} holds a whole model: name it with --pretrained, not --visual")
    chosen, *others = fitting or candidates[:1]
    notes = []
    if chosen.trail:
        notes.append(f"taking {' > '.join(chosen.trail)}")
    if others:
        names = sorted({_telling(other, chosen) for other in others})
        notes.append(f"not {', '.join(names)} (chosen by {path.name}#{names[0]})")
    if chosen.beside:
        notes.append(f"leaving {some(sorted(chosen.beside))}")
    if notes:
        say(f"{path.name}: {', '.join(notes)}")
    return chosen


def _telling(other: Candidate, chosen: Candidate) -> str:
    """Return the first name on the way to `other` that is not on the way to `chosen`."""
    return next((name for name in other.names if name not in chosen.names), other.names[-1])


def _below(found: Any, key: str) -> list[Candidate]:
    if not isinstance(found, Mapping):
        return []
    named = {name: value for name, value in found.items() if isinstance(name, str)}
    return list(_candidates(named.get(key, _behind(named, key)), set(), (key,)))


def _contents(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"it is a {type(found).__name__}"
    if not found:
        return "it is empty"
    keys = [f"{key} ({type(value).__name__})" for key, value in found.items()]
    return f"its keys are {some(keys, limit=6)}; FILE#KEY chooses one"


def some(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names, with the number of the others."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
