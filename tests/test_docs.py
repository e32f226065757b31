"""Commands and figures of the documents: parsers accept the commands, result files have the figures."""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from edgeclip.cli.main import build_parser
from tests.support.paths import EXAMPLES, ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("benchmarks", "edgeclip", "examples", "export", "train")
FENCE = re.compile(r"^```(?:console|sh|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# An example in a help text or docstring, up to a remark behind two spaces.
EXAMPLE = re.compile(r"^ {2,4}((?:edgeclip|python -m) (?:.*\\\\?\n)*.*)$", re.MULTILINE)


class Command(NamedTuple):
    """Command of a document, split into words as a shell splits them."""

    document: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def lines(block: str) -> list[str]:
    """Return the commands of a block: the lines after a prompt, or all lines without one."""
    joined = re.sub(r"\\\n\s*", "", block).splitlines()
    prompted = [line[2:] for line in joined if line.startswith("$ ")]
    return prompted or [line for line in joined if line.strip()]


def programs(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of each program of a line, without redirections, variables and sudo."""
    lexer = shlex.shlex(
        re.sub(r"\bsudo (-u \w+ )?", "", line), posix=True, punctuation_chars="|&;<>"
    )
    lexer.commenters = "#"
    lexer.whitespace_split = True
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
    """Yield the commands of the documents, and those of help texts and docstrings."""
    for document in DOCUMENTS:
        for block in FENCE.findall(document.read_text(encoding="utf-8")):
            for line in lines(block):
                for words in programs(line):
                    yield Command(document.name, words)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for example in EXAMPLE.findall(path.read_text(encoding="utf-8")):
                line = re.sub(r"\\\\?\n\s*", "", example)
                for words in programs(re.split(" {2,}", line)[0]):
                    yield Command(str(path.relative_to(ROOT)), words)


SHOWN = list(dict.fromkeys(commands()))


def after(command: Command, program: str) -> tuple[str, ...] | None:
    """Return the arguments of a program, whatever path it is called by."""
    names = [Path(word).name for word in command.words[:1]]
    return command.words[1:] if names == [program] else None


def module(command: Command) -> tuple[str, ...] | None:
    """Return a module of this repository that Python or torchrun starts, and its arguments."""
    if after(command, "python") is None and after(command, "torchrun") is None:
        return None
    if "-m" not in command.words:
        return None
    words = command.words[command.words.index("-m") + 1 :]
    return words if words[0].partition(".")[0] in PACKAGES else None


EDGECLIP = [c for c in SHOWN if after(c, "edgeclip")]
MODULES = [c for c in SHOWN if module(c)]
TARGETS = [c for c in SHOWN if after(c, "make")]


def test_commands_are_found() -> None:
    assert {"README.md", "jetson.md", "edgeclip/cli/predict.py"} <= {c.document for c in EDGECLIP}
    assert {after(command, "edgeclip")[0] for command in EDGECLIP} >= {  # type: ignore[index]
        "classify",
        "embed",
        "explain",
        "doctor",
        "bench",
    }
    assert {"README.md", "training.md", "export/fused.py"} <= {c.document for c in MODULES}
    assert "CONTRIBUTING.md" in {c.document for c in SHOWN}
    assert {module(command)[0] for command in MODULES} >= {  # type: ignore[index]
        "export",
        "export.triton",
        "train.evaluate",
        "train.tgazsr",
    }
    assert len(TARGETS) > 1


@pytest.mark.parametrize("command", EDGECLIP, ids=str)
def test_commands_of_edgeclip_parse(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        build_parser().parse_args(after(command, "edgeclip"))
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


class Parsed(BaseException):
    """End of a command that has parsed its arguments."""


@pytest.mark.parametrize("command", MODULES, ids=str)
def test_commands_of_modules_parse(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Start each module with the arguments shown, and stop it once it has parsed them."""

    def parse(parser: argparse.ArgumentParser, *arguments: object) -> None:
        original(parser, *arguments)  # type: ignore[arg-type]
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    name, *arguments = module(command) or ()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    # runpy warns of a module that is loaded. A package stays: its parent refers to it.
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    loaded = f"{name}.__main__" if is_package else name
    monkeypatch.delitem(sys.modules, loaded, raising=False)
    try:
        runpy.run_module(name, run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{command}: {capsys.readouterr().err}")


@pytest.mark.parametrize("command", TARGETS, ids=str)
def test_targets_are_there(command: Command) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in command.words[1:] if "=" not in word} <= set(targets)


def test_a_wrong_command_is_found() -> None:
    """Extract commands as documents write them."""
    block = (
        "$ FOO=1 edgeclip classify 'a b.jpg' --label \"a cat\" \\\n    --top-k 2 > out.csv  # why\n"
        "  61.0%  a cat\n"
        "$ cat a.jpg | sudo -u edgeclip FOO=1 venv/bin/edgeclip info && make test\n"
        "$ torchrun --nproc-per-node 4 -m train.evaluate a --eps 1\n"
    )
    found = [words for line in lines(block) for words in programs(line)]
    assert found[:4] == [
        ("edgeclip", "classify", "a b.jpg", "--label", "a cat", "--top-k", "2"),
        ("cat", "a.jpg"),
        ("venv/bin/edgeclip", "info"),
        ("make", "test"),
    ]
    assert after(Command("", found[2]), "edgeclip") == ("info",)
    assert after(Command("", found[1]), "edgeclip") is None
    assert module(Command("", found[4])) == ("train.evaluate", "a", "--eps", "1")
    assert module(Command("", ("python", "-m", "pytest"))) is None


def percent(share: float) -> str:
    """Return a share of all images as a percentage, as the documents write it."""
    return f"{100 * share:.1f}"


def interval(share: float, count: int) -> str:
    """Return the 95 % confidence interval of a share of `count` images, in percent."""
    return f"{percent(share)} ± {196 * math.sqrt(share * (1 - share) / count):.1f} %"


@pytest.mark.parametrize("name", ["robust-autoattack-8", "plain-none-8"])
def test_the_readme_repeats_measured_figures(name: str) -> None:
    result = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert interval(result["worst_case_accuracy"], result["finished"]) in text
    assert f"clean: {percent(result['clean_accuracy'])} %" in text


def test_every_photograph_is_credited_and_small() -> None:
    credits = (EXAMPLES / "CREDITS.md").read_text(encoding="utf-8")
    photographs = sorted((EXAMPLES / "photos").iterdir())
    assert photographs
    for path in photographs:
        assert f"| `{path.name}` |" in credits
        assert path.stat().st_size < 100_000
        with Image.open(path) as image:
            assert max(image.size) <= 640
