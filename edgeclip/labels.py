"""Labels in plain words: label files, prompt templates, and their text embeddings."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import LabelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Label:
    """A class: its name, and its own prompts where templates shall not be used."""

    name: str
    prompts: tuple[str, ...] = ()

    def worded(self, templates: Sequence[str]) -> list[str]:
        """The prompts whose mean embedding stands for this class."""
        return list(self.prompts) or [template.replace("{}", self.name) for template in templates]


@dataclass(frozen=True, eq=False)
class LabelSet:
    """Labels with their text embeddings, ready to classify with."""

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]  # (K, D), unit rows
    null_scores: NDArray[np.float32]  # (K,): embeddings @ null_text

    def __len__(self) -> int:
        return len(self.names)


def read_labels(path: str | PathLike[str]) -> list[Label]:
    """The labels of a file: one class per line, `#` starts a comment line, blank lines are ignored.

    `class | prompt one | prompt two` gives a class prompts of its own, used as they are.
    Raises LabelError, with the line's number, for a name that is empty or there already, and
    where the file cannot be read or holds no label.
    """
    labels: dict[str, tuple[Label, int]] = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, *prompts = (part.strip() for part in line.split("|"))
        if not name or not all(prompts):
            raise LabelError(f"{path}:{number}: empty class name or prompt; expected NAME | PROMPT")
        if name in labels:
            raise LabelError(
                f"{path}:{number}: label {name!r} is already on line {labels[name][1]}; "
                "remove one of them"
            )
        labels[name] = Label(name, tuple(prompts)), number
    if not labels:
        raise LabelError(f"{path}: no labels in this file; write one class per line")
    return [label for label, _ in labels.values()]


def check_labels(names: Iterable[str | Label]) -> list[Label]:
    """Labels from names. Raises LabelError for none, an empty one, or one that is there twice."""
    if isinstance(names, str):
        raise TypeError("labels must be a list of names; for a label file use edgeclip.read_labels")
    labels = [name if isinstance(name, Label) else Label(name.strip()) for name in names]
    if not labels:
        raise LabelError("no labels: name at least one class")
    seen: set[str] = set()
    for label in labels:
        if not label.name:
            raise LabelError("a label is empty")
        if label.name in seen:
            raise LabelError(f"label {label.name!r} is there twice; remove one of them")
        seen.add(label.name)
    return labels


def read_templates(arguments: Iterable[str]) -> list[str]:
    """Templates from arguments that are templates, or files with one template per line.

    Raises LabelError for one that has no `{}` and is no file, or a file without templates.
    """
    templates: list[str] = []
    for argument in arguments:
        if "{}" in argument:
            templates.append(argument)
            continue
        if not Path(argument).is_file():
            raise LabelError(
                f"template {argument!r} has no {{}} for the class name, and is not a file"
            )
        lines = [line.strip() for line in _read_text(argument).splitlines()]
        templates += check_templates(
            [line for line in lines if line and not line.startswith("#")], argument
        )
    return templates


def check_templates(templates: Sequence[str], where: str = "templates") -> list[str]:
    """Raises LabelError where there is no template, or one without `{}`."""
    if not templates:
        raise LabelError(f"{where}: no template; write one per line, {{}} for the class name")
    for template in templates:
        if "{}" not in template:
            raise LabelError(f"{where}: template {template!r} has no {{}} for the class name")
    return list(templates)


def _read_text(path: str | PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as err:
        raise LabelError(f"{path}: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise LabelError(f"{path}: not UTF-8 text; save it as UTF-8") from err


class EmbeddingCache:
    """Text embeddings on disk, by content: what was encoded, and by which encoder.

    In $EDGECLIP_CACHE, else $XDG_CACHE_HOME/edgeclip, else ~/.cache/edgeclip. Several processes may
    use it at once. A cache that cannot be read or written costs time, never an answer: it is
    logged, and the text is encoded again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or default_cache_folder()

    @staticmethod
    def key(encoder: str, prompts: Sequence[Sequence[str]]) -> str:
        """The name under which the embeddings of `prompts`, one list per class, are kept."""
        content = json.dumps([encoder, prompts], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def load(self, key: str, shape: tuple[int, int]) -> NDArray[np.float32] | None:
        """The array kept under `key`, or None where there is none of this shape."""
        path = self._folder / f"{key}.npy"
        try:
            array = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as err:
            logger.warning("label cache: cannot read %s (%s); encoding the labels again", path, err)
            return None
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            logger.warning("label cache: %s is damaged; encoding the labels again", path)
            return None
        return np.ascontiguousarray(array)

    def store(self, key: str, array: NDArray[np.float32]) -> None:
        """Keep an array; readers see all of it or nothing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                np.save(file, array, allow_pickle=False)
            os.replace(file.name, self._folder / f"{key}.npy")
        except OSError as err:
            logger.warning("label cache: cannot write to %s (%s)", self._folder, err)


def default_cache_folder() -> Path:
    if folder := os.environ.get("EDGECLIP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeclip"
