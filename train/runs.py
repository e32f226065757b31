"""A training run on disk: a folder that open_clip can load, and a checkpoint to resume from.

RUN/open_clip_config.json        model, preprocessing, vocabulary (open_clip's local-dir form)
RUN/open_clip_model.safetensors  the weights
RUN/bpe.txt.gz                   the tokenizer's merges, where they are not open_clip's own
RUN/checkpoint.pt                everything needed to go on (weights_only; no pickled code)
RUN/metrics.jsonl                one line per epoch
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file

Settings = TypeVar("Settings")


def parse_settings(cls: type[Settings], description: str, epilog: str) -> Settings:
    """A dataclass of settings from the command line: one option per field, its help in metadata."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        option = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
        else:
            needed = field.default is dataclasses.MISSING
            parse = field.metadata.get("type") or type(field.default)
            parser.add_argument(
                option,
                type=parse,
                required=needed,
                default=None if needed else field.default,
                metavar=field.name.rpartition("_")[2].upper(),
                help=text if needed else f"{text} (default: {field.default})",
            )
    return cls(**vars(parser.parse_args()))


def setting(
    default: Any = dataclasses.MISSING, *, help: str, type: Callable[[str], Any] | None = None
) -> Any:
    """A dataclass field that carries its meaning for --help."""
    return dataclasses.field(default=default, metadata={"help": help, "type": type})


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def write_small_bpe(path: Path, merges: int) -> SimpleTokenizer:
    """The first `merges` merges of CLIP's byte-pair encoding, in open_clip's own file form.

    Text of any kind can still be encoded, in more tokens; the embedding table shrinks from
    49,408 rows to 512 + merges + 2.
    """
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: merges + 1]  # the first line is a header

    def write(part: Path) -> None:
        with (
            open(part, "wb") as raw,
            gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as out,
        ):
            out.write("\n".join(lines).encode())

    write_atomically(path, write)
    return SimpleTokenizer(bpe_path=str(path))


def save_model(folder: Path, model: CLIP, config: dict[str, Any]) -> None:
    """Write the weights and the configuration in the form that open_clip loads as local-dir:RUN."""
    weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    write_atomically(folder / "open_clip_model.safetensors", lambda part: save_file(weights, part))
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "open_clip_config.json", lambda part: part.write_text(text))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / "checkpoint.pt", lambda part: torch.save(state, part))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The checkpoint of a run, or None where there is none yet. No pickled code is run."""
    path = folder / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.is_file() else None
