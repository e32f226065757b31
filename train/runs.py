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
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from edgeclip.errors import EdgeclipError
from export.checkpoints import Source
from train.samples import DataError

Settings = TypeVar("Settings")
TOKENIZER_FILES = (  # as Hugging Face's libraries call them
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class SettingsError(Exception):
    """Settings that make no sense, or do not fit the model, the data or the run; one line."""


class Parser(argparse.ArgumentParser):
    """Help with the examples as they are written, and one clear line on wrong usage."""

    def __init__(self, prog: str, positional: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} {positional} [options]".replace("  ", " "),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_measurement(self, *, steps: int, samples: int, required: bool) -> None:
        """What accuracy under attack is measured with; steps and samples are defaults."""
        add = self.add_argument
        add("--data", required=required, metavar="NAME[:PATH]", help="data set; its test split")
        add("--eps", type=fraction, required=required, help="in units of [0, 1]: 8/255")
        add("--norm", default="linf", choices=("linf", "l2"))
        add("--steps", type=int, default=steps, help=f"of each attack (default: {steps})")
        add(
            "-n", "--samples", type=int, default=samples, metavar="N",
            help=f"images, drawn by the seed (default: {samples})",
        )  # fmt: skip
        add("--seed", type=int, default=0, help="of the draw and of the attacks (default: 0)")
        add("--batch-size", type=int, default=100, help="images attacked at a time (default: 100)")
        add("--device", default="auto", choices=("auto", "cpu", "cuda"))
        add("--threads", type=int, default=0, help="of torch; 0 leaves its default")
        add("--download", action="store_true", help="fetch the data set where it is missing")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def run(command: Callable[[], None]) -> NoReturn:
    """Run a command and exit: with 0, or with 2 after one line that says what to change."""
    try:
        command()
        sys.exit(0)
    except torch.OutOfMemoryError:
        message = "the device is out of memory: lower --batch-size, or raise --accumulate"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (SettingsError, DataError, EdgeclipError, OSError) as err:
        # An error of a process that reads images comes with that process's traceback before it.
        message = str(err).strip().splitlines()[-1].removeprefix("train.samples.DataError: ")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_number(option: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises SettingsError unless low <= value <= high."""
    if not (math.isfinite(value) and low <= value <= high):
        limit = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise SettingsError(f"--{option.replace('_', '-')} must be {limit}, got {value:g}")


def check_eps(option: str, value: float, norm: str) -> None:
    """Raises SettingsError for a size that is negative, or of 255 by mistake."""
    check_number(option, value, 0)
    if norm == "linf" and value >= 1:
        option = option.replace("_", "-")
        raise SettingsError(
            f"--{option} is in units of [0, 1], got {value:g}: for {value:g} of 255 "
            f"give --{option} {value:g}/255"
        )


def parse_settings(cls: type[Settings], prog: str, description: str, epilog: str) -> Settings:
    """A dataclass of settings from the command line: one option per field, its help in metadata."""
    parser = Parser(prog, "", description, epilog)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        option = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true", help=text)
        else:
            needed = field.default is dataclasses.MISSING
            choices = field.metadata.get("choices")
            silent = needed or field.default is None  # None: the help says what happens
            parser.add_argument(
                option,
                type=field.metadata.get("type") or type(field.default),
                choices=choices,
                required=needed,
                default=None if needed else field.default,
                metavar=None if choices else field.name.rpartition("_")[2].upper(),
                help=text if silent else f"{text} (default: {_shown(field.default)})",
            )
    return cls(**vars(parser.parse_args()))


def _shown(default: Any) -> str:
    """A default as a user would write it: 1/255 rather than 0.00392156862745098."""
    if isinstance(default, float) and 0 < default < 1:
        fraction = Fraction(default).limit_denominator(255)
        if fraction.denominator == 255 and float(fraction) == default:
            return str(fraction)
    return str(default)


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    type: Callable[[str], Any] | None = None,
    choices: Collection[str] | None = None,
) -> Any:
    """A dataclass field that carries its meaning for --help."""
    metadata = {"help": help, "type": type, "choices": choices and tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def fraction(text: str) -> float:
    """A number as a decimal or a fraction: 0.03, 8/255."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a number such as 8/255, got {text!r}") from None


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


def copy_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer's files of a model that brings its own, beside the model that is made of it."""
    merges = (source.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("bpe_path")
    for name in filter(None, (merges, *TOKENIZER_FILES)):
        file = source.folder / name if source.folder else None
        if file and file.is_file() and not (folder / name).exists():
            shutil.copyfile(file, folder / name)


def save_model(folder: Path, model: CLIP, config: dict[str, Any]) -> None:
    """Write the weights and the configuration in the form that open_clip loads as local-dir:RUN."""
    weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    write_atomically(folder / "open_clip_model.safetensors", lambda part: save_file(weights, part))
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "open_clip_config.json", lambda part: part.write_text(text))


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    write_atomically(folder / "checkpoint.pt", lambda part: torch.save(state, part))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The checkpoint of a run, or None where there is none yet. No pickled code is run.

    Raises SettingsError for a file that is damaged.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # on a broken file the reader raises anything
        raise SettingsError(f"{path} cannot be read: remove it, or name another folder") from err


class Metrics:
    """metrics.jsonl of a run, and the same figures for TensorBoard; nothing unless enabled.

    What a killed run wrote after its last checkpoint is dropped: those steps come again.
    """

    def __init__(self, folder: Path, step: int, *, enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line).get("step", 0) <= step]
        write_atomically(path, lambda part: part.write_text("".join(kept)))
        self._file = open(path, "a")  # noqa: SIM115  (closed on exit)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row of figures; it names its step."""
        if not self._enabled:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self._enabled:
            self._file.close()
            self._board.close()
