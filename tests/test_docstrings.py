"""Openings of docstrings: a verb in functions, a noun of the field elsewhere (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

FILES = sorted(
    path
    for folder in ("benchmarks", "edgeclip", "examples", "export", "tests", "train")
    for pattern in ("*.py", "*.pyi")
    for path in (ROOT / folder).rglob(pattern)
)
VAGUE = {"how", "not", "of", "those", "what", "where", "which", "who"}
NO_VERBS = {
    *("a", "all", "an", "as", "at", "both", "by", "each", "every", "for", "from", "if", "in", "it"),
    *("its", "no", "none", "nothing", "on", "one", "only", "that", "the", "these", "this", "to"),
    *("true", "false", "two", "when", "whether", "while", "with", "without"),
}


def openings(tree: ast.Module) -> Iterator[tuple[int, bool, str]]:
    """Yield the line, whether it is a function's, and the first word of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                line = 1 if isinstance(node, ast.Module) else node.lineno
                function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield line, function, text.split(maxsplit=1)[0].strip("`.,:;()").lower()


@pytest.mark.parametrize("folder", sorted({path.relative_to(ROOT).parts[0] for path in FILES}))
def test_docstrings_open_with_a_verb_or_a_noun(folder: str) -> None:
    wrong = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == folder:
            for line, function, word in openings(ast.parse(path.read_text("utf-8"))):
                if word in VAGUE or (function and word in NO_VERBS):
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: opens with {word!r}")
    assert not wrong, "\n".join(wrong)
