"""Labels: label files, prompt templates, and sets of labels with their text embeddings."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from edgeclip.errors import LabelError

STDIN = "-"
LINE_END = re.compile("\r\n|\r|\n")
MARK = re.compile(r"(?<!\\)(\\*)([#|])")  # with the backslashes before it
CONTROL = re.compile(r"[\x00-\x08\n-\x1f\x7f-\x9f]")  # all control characters except the tab


@dataclass(frozen=True)
class Label:
    """A class name, with optional prompts that replace the templates.

    `{}` in a prompt stands for the name, as in a template.
    """

    name: str
    prompts: tuple[str, ...] = ()

    def worded(self, templates: Sequence[str]) -> list[str]:
        """Return the prompts of this class, whose mean is its embedding."""
        return [text.replace("{}", self.name) for text in self.prompts or templates]


@dataclass(frozen=True, eq=False)
class LabelSet:
    """Labels with their text embeddings, for the bundle that made them."""

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

    @classmethod
    def random(
        cls, count: int, null_text: NDArray[np.float32], encoder: str = "", *, seed: int = 0
    ) -> LabelSet:
        """Return `count` random unit embeddings as labels, for measurements and checks.

        null_text: the bundle's, float32 (D,). encoder: Runtime.text_identity, for use with a Runtime.
        """
        shape = count, len(null_text)
        rows = np.random.default_rng(seed).standard_normal(shape, np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return cls(tuple(f"class {i}" for i in range(count)), rows, rows @ null_text, encoder)


Labels = LabelSet | Sequence[str | Label]


def read_labels(path: str | PathLike[str]) -> list[Label]:
    """Read a label file, or standard input for `-`: one class per line.

    `class | prompt one | prompt two` replaces the templates for a class; `{}` stands for its name.
    Blank lines and comment lines, which start with `#`, are ignored. A backslash before a `#` or `|`
    makes it an ordinary character; two backslashes there stand for one.
    Raises LabelError, with the line number, for a name that is empty, invalid text or a duplicate,
    and for a file that is unreadable or has no label.
    """
    labels: dict[str, tuple[Label, int]] = {}
    for number, line in _entries(path):
        name, *prompts = _fields(line)
        try:
            label = _check_label(Label(name, tuple(prompts)))
        except LabelError as err:
            raise LabelError(f"{_place(path)}:{number}: {err}") from err
        if label.name in labels:
            raise LabelError(
                f"{_place(path)}:{number}: label {label.name!r} is already on line "
                f"{labels[label.name][1]}; remove one of them"
            )
        labels[label.name] = label, number
    if not labels:
        raise LabelError(f"{_place(path)}: no labels in this file; write one class per line")
    return [label for label, _ in labels.values()]


def check_labels(names: Iterable[str | Label]) -> list[Label]:
    """Convert names to Labels.

    Raises LabelError for no names, and for a name that is empty, invalid text or a duplicate.
    """
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


def _check_label(item: str | Label) -> Label:
    label = item if isinstance(item, Label) else Label(item)
    if isinstance(label.prompts, str):
        raise TypeError(f"the prompts of a label must be a tuple of texts, got {label.prompts!r}")
    texts = (label.name, *label.prompts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"labels must be names or Label objects, got {item!r}")
    name, *prompts = (text.strip() for text in texts)
    if not (name and all(prompts)):
        raise LabelError("a label, or one of its prompts, is empty")
    _check_text("label", name)
    for prompt in prompts:
        _check_text(f"label {name!r}: prompt", prompt)
    return Label(name, tuple(prompts))


def read_templates(arguments: Iterable[str]) -> list[str]:
    """Collect templates from arguments: each a template, a template file, or `-` for standard input.

    A file has one template per line, with the blank lines, comments and backslashes of a label file.
    Raises LabelError for an argument that neither contains `{}` nor is a file, and for a file
    without templates.
    """
    templates: list[str] = []
    for argument in arguments:
        if "{}" in argument:
            templates += check_templates([argument])
        elif argument == STDIN or os.path.exists(argument):  # a pipe too
            lines = ["|".join(_fields(line)) for _, line in _entries(argument)]
            templates += check_templates(lines, _place(argument))
        else:
            raise LabelError(
                f"template {argument!r} has no {{}} for the class name, and is not a file"
            )
    return templates


def check_templates(templates: Iterable[str], where: str = "templates") -> list[str]:
    """Return the templates as a list. Raises LabelError for none, or one without `{}` or invalid."""
    if isinstance(templates, str):
        raise TypeError(f"{where} must be a list of templates, got {templates!r}")
    templates = list(templates)
    if not templates:
        raise LabelError(f"{where}: no template; write one per line, {{}} for the class name")
    for template in templates:
        if "{}" not in template:
            raise LabelError(f"{where}: template {template!r} has no {{}} for the class name")
        _check_text(f"{where}: template", template)
    return templates


def read_lines(path: str | PathLike[str]) -> list[str]:
    """Return the lines of a UTF-8 text file, without their ends; `-` is standard input.

    Lines end with \\n, \\r\\n or \\r alone: str.splitlines would also split at characters that
    belong to a text. A byte order mark is dropped. Raises LabelError.
    """
    try:
        if os.fspath(path) == STDIN:
            raw = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                raw = file.read()
        lines = LINE_END.split(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as err:
        raise LabelError(f"{_place(path)}: not UTF-8 text; save it as UTF-8") from err
    except OSError as err:
        raise LabelError(f"{_place(path)}: {err.strerror or err}") from err
    return lines if lines[-1] else lines[:-1]


def _entries(path: str | PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield number and text of the lines that are neither blank nor comments."""
    for number, line in enumerate(map(str.strip, read_lines(path)), 1):
        if line and not line.startswith("#"):
            yield number, line


def _fields(line: str) -> list[str]:
    """Split a line at each unescaped `|`, and unescape its fields."""
    fields, end = [""], 0
    for match in MARK.finditer(line):
        backslashes, mark = match.groups()
        fields[-1] += line[end : match.start()] + "\\" * (len(backslashes) // 2)
        if mark == "|" and len(backslashes) % 2 == 0:
            fields.append("")
        else:
            fields[-1] += mark
        end = match.end()
    fields[-1] += line[end:]
    return fields


def _place(path: str | PathLike[str]) -> str:
    """Return the name of a file in errors."""
    return "stdin" if os.fspath(path) == STDIN else str(path)


def _check_text(kind: str, text: str) -> None:
    """Raise LabelError for undecodable bytes, and for control characters except the tab.

    Control characters break tables, lists of names and terminals.
    """
    try:
        text.encode()
    except UnicodeEncodeError as err:  # a command line in another encoding
        raise LabelError(f"{kind} {text!r} is not valid text; write it in UTF-8") from err
    if control := CONTROL.search(text):
        raise LabelError(
            f"{kind} {text!r} has the control character U+{ord(control[0]):04X}; remove it"
        )
