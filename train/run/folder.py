"""Folder of a training run: a model that open_clip loads, and a checkpoint to resume from.

RUN/open_clip_config.json        model, preprocessing, vocabulary (open_clip's local-dir form)
RUN/open_clip_model.safetensors  the weights
RUN/bpe.txt.gz                   the tokenizer's merges, where they are not open_clip's own
RUN/text/                        configuration and tokenizer of a text tower from transformers
RUN/checkpoint.pt                the state to resume from (read with weights_only; no pickled code)
RUN/metrics.jsonl                metrics, a row for each step or epoch; RUN/tensorboard has them too
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from edgeclip import storage
from edgeclip.bundle import MANIFEST
from edgeclip.json_output import to_json
from train.errors import SettingsError
from train.models import transformers_text
from train.models.architectures import CONFIG
from train.models.checkpoints import Source

TOKENIZER_FILES = (  # the names in Hugging Face's libraries
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Settings that may change on --resume: on one kind of device they change weights by rounding alone.
MAY_CHANGE = {"resume", "workers", "threads", "download", "checkpoint_every", "device", "out"}


def write_small_bpe(path: Path, merges: int) -> SimpleTokenizer:
    """Write the first `merges` merges of CLIP's byte-pair encoding in open_clip's file form.

    Any text can still be encoded, in more tokens. The embedding table shrinks from 49,408 rows to
    512 + merges + 2. Returns the tokenizer.
    """
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: merges + 1]  # the first line is a header

    with (
        storage.writing(path) as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as out,
    ):
        out.write("\n".join(lines).encode())
    return SimpleTokenizer(bpe_path=str(path))


def copy_tokenizer(source: Source, folder: Path) -> None:
    """Write the source's tokenizer files, and those of a transformers tower, beside the new model."""
    text = source.config["model_cfg"]["text_cfg"]
    if transformers_text.has_tower(text):
        transformers_text.save(folder, source.model.text.config, source.tokenizer)
    merges = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    for name in filter(None, (merges, *TOKENIZER_FILES)):
        file = source.folder / name if source.folder else None
        if file and file.is_file() and not (folder / name).exists():
            storage.write(folder / name, file.read_bytes())


def save_model(folder: Path, model: CLIP, config: dict[str, Any]) -> None:
    """Write weights and configuration in the form that open_clip loads as local-dir:RUN."""
    weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    with storage.draft(folder / "open_clip_model.safetensors") as part:
        save_file(weights, part)
    storage.write(folder / "open_clip_config.json", to_json(config, indent=2) + "\n")


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint of a run in one step."""
    with storage.writing(folder / "checkpoint.pt") as file:
        torch.save(state, file)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Load the checkpoint of a run, None where there is none yet. No pickled code is run.

    Raises SettingsError for a damaged file.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises any type for a damaged file
        raise SettingsError(f"{path} cannot be read: remove it, or name another folder") from err
    return state


class Metrics:
    """Metrics of a run, in metrics.jsonl and for TensorBoard; without `enabled`, nothing is written.

    Rows that a killed run wrote after its last checkpoint, at `step`, are dropped: the resumed run
    repeats their steps.
    """

    def __init__(self, folder: Path, step: int, *, enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line).get("step", 0) <= step]
        storage.write(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed on exit)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row of metrics, one of which is its step."""
        if not self._enabled:
            return
        self._file.write(to_json(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Close the files."""
        if self._enabled:
            self._file.close()
            self._board.close()


def open_folder(out: Path, *, setting: str, resume: bool) -> dict[str, Any] | None:
    """Return the checkpoint to resume from, None for a new run.

    setting: the name of a setting that only this kind of run has. Raises SettingsError for a folder
    with other contents, or with a run and without `resume`.
    """
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file: --out names a folder")
    previous = load_checkpoint(out)
    if previous is None:
        for name in (CONFIG, MANIFEST):  # a model and a bundle have files of a run's names
            if (out / name).is_file():
                raise SettingsError(f"{out} holds a model or a bundle: name another folder")
        return None
    if setting not in previous.get("training", {}):
        raise SettingsError(f"{out} holds a run of another kind: name another folder")
    if not resume:
        raise SettingsError(f"{out} holds a run already: add --resume, or name another folder")
    return previous


def check_same_run(out: Path, settings: dict[str, Any], previous: dict[str, Any]) -> None:
    """Raise SettingsError where a setting differs from the previous one; see MAY_CHANGE."""
    for name, value in settings.items():
        if name not in MAY_CHANGE and previous.get(name) != value:
            option = name.replace("_", "-")
            if name == "classes":  # too long for one line
                change = f"other {option}"
            else:
                change = f"{option} {previous.get(name)}, not {value}"
            raise SettingsError(
                f"{out} was begun with {change}: resume it with the same, or name another folder"
            )
