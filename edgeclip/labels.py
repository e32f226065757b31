"""Labels in plain words: label files, prompt templates, and their text embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import LabelError


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
    """Labels with their text embeddings, ready to classify with, on the bundle that made them."""

    names: tuple[str, ...]
    embeddings: NDArray[np.float32]  # (K, D), unit rows
    null_scores: NDArray[np.float32]  # (K,): embeddings @ null_text
    encoder: str  # Runtime.text_identity of the bundle

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.embeddings) == len(self.null_scores):
            raise ValueError(
                f"[LabelSet] expected as many rows as names, got {len(self.names)} names, "
                f"{self.embeddings.shape} embeddings and {self.null_scores.shape} null scores"
            )
        self.embeddings.flags.writeable = False  # shared by threads
        self.null_scores.flags.writeable = False

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
    labels = [_check_label(name) for name in names]
    if not labels:
        raise LabelError("no labels: name at least one class")
    seen: set[str] = set()
    for label in labels:
        if label.name in seen:
            raise LabelError(f"label {label.name!r} is there twice; remove one of them")
        seen.add(label.name)
    return labels


def _check_label(given: str | Label) -> Label:
    label = given if isinstance(given, Label) else Label(given)
    if isinstance(label.prompts, str):
        raise TypeError(f"the prompts of a label must be a tuple of texts, got {label.prompts!r}")
    texts = (label.name, *label.prompts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"labels must be names or Label objects, got {given!r}")
    name, *prompts = (text.strip() for text in texts)
    if not (name and all(prompts)):
        raise LabelError("a label, or one of its prompts, is empty")
    if not all(map(_is_text, texts)):
        raise LabelError(f"label {name!r} is not valid text; write it in UTF-8")
    return Label(name, tuple(prompts))


def _is_text(text: str) -> bool:
    """Not so for what the command line held in another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_templates(arguments: Iterable[str]) -> list[str]:
    """Templates from arguments that are templates, or files with one template per line.

    Raises LabelError for one that has no `{}` and is no file, or a file without templates.
    """
    templates: list[str] = []
    for argument in arguments:
        if "{}" in argument:
            templates.append(argument)
            continue
        if not os.path.isfile(argument):
            raise LabelError(
                f"template {argument!r} has no {{}} for the class name, and is not a file"
            )
        lines = [line.strip() for line in _read_text(argument).splitlines()]
        templates += check_templates(
            [line for line in lines if line and not line.startswith("#")], argument
        )
    return templates


def check_templates(templates: Iterable[str], where: str = "templates") -> list[str]:
    """Raises LabelError where there is no template, or one without `{}`."""
    if isinstance(templates, str):
        raise TypeError(f"{where} must be a list of templates, got {templates!r}")
    templates = list(templates)
    if not templates:
        raise LabelError(f"{where}: no template; write one per line, {{}} for the class name")
    for template in templates:
        if "{}" not in template:
            raise LabelError(f"{where}: template {template!r} has no {{}} for the class name")
    return templates


def _read_text(path: str | PathLike[str]) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as err:
        raise LabelError(f"{path}: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise LabelError(f"{path}: not UTF-8 text; save it as UTF-8") from err
