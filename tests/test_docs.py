"""The commands that the documents show: edgeclip's parse, modules and make's targets are there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edgeclip.cli.main import build_parser
from tests.support.paths import EXAMPLES

ROOT = EXAMPLES.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?:console|sh|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"(train|export|benchmarks|examples|edgeclip)(\.|$)")


class Command(NamedTuple):
    document: str
    words: tuple[str, ...]  # of one program, as a shell would split them

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def lines(block: str) -> list[str]:
    """The commands of a block: all lines, or those after a prompt, with what continues them."""
    joined = re.sub(r"\\\n\s*", "", block).splitlines()
    prompted = [line[2:] for line in joined if line.startswith("$ ")]
    return prompted or [line for line in joined if line.strip()]


def programs(line: str) -> Iterator[tuple[str, ...]]:
    """The words of each program of a line, without redirections, settings, sudo and the like."""
    lexer = shlex.shlex(
        re.sub(r"\bsudo (-u \w+ )?", "", line), posix=True, punctuation_chars="|&;<>"
    )
    lexer.commenters = "#"
    words: list[str] = []
    redirected = False
    for word in [*lexer, ";"]:
        if set(word) <= set("|&;"):
            if words:
                yield tuple(words)
            words, redirected = [], False
        elif set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif words or "=" not in word:
            words.append(word)


def commands() -> Iterator[Command]:
    for document in DOCUMENTS:
        for block in FENCE.findall(document.read_text(encoding="utf-8")):
            for line in lines(block):
                for words in programs(line):
                    yield Command(document.name, words)


SHOWN = list(commands())


def after(command: Command, program: str) -> tuple[str, ...] | None:
    """The arguments of a program, by whatever path it is called."""
    names = [Path(word).name for word in command.words[:1]]
    return command.words[1:] if names == [program] else None


EDGECLIP = [c for c in SHOWN if after(c, "edgeclip")]
MODULES = [c for c in SHOWN if (after(c, "python") or ())[:1] == ("-m",)]
TARGETS = [c for c in SHOWN if after(c, "make")]


def test_commands_are_found() -> None:
    assert {"README.md", "jetson.md"} <= {command.document for command in EDGECLIP}
    assert {after(command, "edgeclip")[0] for command in EDGECLIP} >= {  # type: ignore[index]
        "classify",
        "embed",
        "explain",
        "doctor",
        "bench",
    }
    assert len(MODULES) > 5
    assert len(TARGETS) > 1


@pytest.mark.parametrize("command", EDGECLIP, ids=str)
def test_commands_of_edgeclip_parse(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        build_parser().parse_args(after(command, "edgeclip"))
    except SystemExit:
        pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("command", MODULES, ids=str)
def test_modules_are_there(command: Command) -> None:
    module = command.words[2]
    if OURS.match(module):
        assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("command", TARGETS, ids=str)
def test_targets_are_there(command: Command) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in command.words[1:] if "=" not in word} <= set(targets)


def test_a_wrong_command_is_found() -> None:
    """The extraction itself, on what documents write."""
    block = (
        "$ FOO=1 edgeclip classify 'a b.jpg' --label \"a cat\" \\\n    --top-k 2 > out.csv  # why\n"
        "  61.0%  a cat\n"
        "$ cat a.jpg | sudo -u edgeclip FOO=1 venv/bin/edgeclip info && make test\n"
    )
    found = [words for line in lines(block) for words in programs(line)]
    assert found == [
        ("edgeclip", "classify", "a b.jpg", "--label", "a cat", "--top-k", "2"),
        ("cat", "a.jpg"),
        ("venv/bin/edgeclip", "info"),
        ("make", "test"),
    ]
    assert after(Command("", found[2]), "edgeclip") == ("info",)
    assert after(Command("", found[1]), "edgeclip") is None
