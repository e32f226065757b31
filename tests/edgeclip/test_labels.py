"""Label files, template files, and their errors."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeclip import Label, LabelError, read_labels
from edgeclip.labels import check_labels, check_templates, read_lines, read_templates

# tmp_path is shared by the examples of a test, each of which overwrites the file.
properties = settings(
    derandomize=True,
    max_examples=50,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# All that UTF-8 encodes but control characters, as labels are stored: without outer white space.
characters = st.characters(codec="utf-8", exclude_categories=["Cc"]) | st.sampled_from("\\#|{}\t ")
texts = st.text(characters, max_size=12).map(str.strip).filter(bool)
label_lists = st.lists(
    st.builds(Label, texts, st.lists(texts, max_size=3).map(tuple)),
    min_size=1,
    max_size=5,
    unique_by=lambda label: label.name,
)


def escaped(text: str) -> str:
    return re.sub(r"(\\*)([#|])", lambda match: f"{match[1] * 2}\\{match[2]}", text)


def write(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "labels.txt"
    path.write_bytes(text.encode(encoding))
    return path


def feed_stdin(patch: pytest.MonkeyPatch, raw: bytes) -> None:
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


def test_label_file(tmp_path: Path) -> None:
    path = write(tmp_path, "# animals\n\ncat\n  dog  \nbird | a bird | a parrot on a twig\n")
    assert read_labels(path) == [
        Label("cat"),
        Label("dog"),
        Label("bird", ("a bird", "a parrot on a twig")),
    ]


def test_label_file_of_other_editors(tmp_path: Path) -> None:
    assert read_labels(write(tmp_path, "Käse\r\n猫\r\n", "utf-8-sig")) == [
        Label("Käse"),
        Label("猫"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no labels in this file"),
        ("# only a comment\n\n", "no labels in this file"),
        ("cat\ndog\ncat\n", r":3: label 'cat' is already on line 1"),
        ("cat | \n", ":1: a label, or one of its prompts, is empty"),
        ("| a prompt\n", ":1: a label, or one of its prompts, is empty"),
        ("cat\ndo\0g\n", r":2: label 'do\\x00g' has the control character U\+0000; remove it"),
        ("cat | a \x1b[31mcat\n", ":1: label 'cat': prompt .* has the control character U.001B"),
        ("cat\x0bdog\n", "U.000B"),
        ("cat\x0cdog\n", "U.000C"),
        ("cat\x85dog\n", "U.0085"),
    ],
)
def test_bad_label_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        read_labels(write(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r"\#1 fan", Label("#1 fan")),
        ("C# code", Label("C# code")),
        (r"C\# code", Label("C# code")),
        (r"a \| b", Label("a | b")),
        (r"a \| b | a {} c", Label("a | b", ("a {} c",))),
        (r"a | b \| c | d", Label("a", ("b | c", "d"))),
        (r"a \\| b", Label("a \\", ("b",))),
        (r"a \\\| b", Label("a \\| b")),
        (r"\\# x", Label("\\# x")),
        (r"C:\dir \\host \n", Label(r"C:\dir \\host \n")),
        ("a\\", Label("a\\")),
        ("  \\# x", Label("# x")),
    ],
)
def test_escapes(tmp_path: Path, line: str, expected: Label) -> None:
    assert read_labels(write(tmp_path, f"# comment\n{line}\n  # comment\n")) == [expected]


@properties
@given(label_lists, st.sampled_from(["\n", "\r\n", "\r"]))
def test_all_labels_survive_a_file(tmp_path: Path, labels: list[Label], end: str) -> None:
    lines = [" | ".join(map(escaped, (label.name, *label.prompts))) for label in labels]
    # With a byte order mark, since a name may begin with that character.
    assert read_labels(write(tmp_path, end.join(lines), "utf-8-sig")) == labels
    assert check_labels(labels) == labels


@properties
@given(st.lists(st.tuples(texts, texts).map("{}".join), min_size=1, max_size=5))
def test_all_templates_survive_a_file(tmp_path: Path, templates: list[str]) -> None:
    path = write(tmp_path, "\n".join(map(escaped, templates)), "utf-8-sig")
    assert read_templates([str(path)]) == templates
    assert read_templates(templates) == templates


@properties
@given(
    st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "replace"))
)
def test_other_files_are_label_errors_or_labels(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(raw)
    with suppress(LabelError):
        labels = read_labels(path)
        assert check_labels(labels) == labels
    with suppress(LabelError):
        assert all("{}" in template for template in read_templates([str(path)]))


@properties
@given(st.lists(st.text(max_size=8), max_size=4))
def test_other_names_are_label_errors_or_labels(names: list[str]) -> None:
    try:
        labels = check_labels(names)
    except LabelError:
        return
    assert [label.name for label in labels] == [name.strip() for name in names]
    assert len({label.name for label in labels}) == len(names) > 0


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ends_of_lines(tmp_path: Path, end: str, encoding: str) -> None:
    # The other line ends of str.splitlines belong to a text.
    lines = ["cat\u2028dog", "", "owl\u2029ape", "a\x85b\x0bc\x0cd\x1ce\x1ef", "last"]
    for text in (end.join(lines), end.join([*lines, ""])):
        assert read_lines(write(tmp_path, text, encoding)) == lines
    assert read_lines(write(tmp_path, "", encoding)) == []
    assert read_labels(write(tmp_path, end.join(lines[:3]), encoding)) == [
        Label("cat\u2028dog"),
        Label("owl\u2029ape"),
    ]


def test_control_characters_are_refused_in_labels_and_templates() -> None:
    for code in range(0x110000):
        text = f"a{chr(code)}b {{}}"
        if unicodedata.category(chr(code)) == "Cc" and text != "a\tb {}":
            with pytest.raises(LabelError, match=f"control character U.{code:04X}; remove it"):
                check_labels([text])
            with pytest.raises(LabelError, match=f"control character U.{code:04X}; remove it"):
                check_templates([text])
    assert check_labels(["a\tb", "a\u200bb"]) == [Label("a\tb"), Label("a\u200bb")]
    for names in (["caf\udce9"], [Label("x", ("caf\udce9",))]):
        with pytest.raises(LabelError, match="is not valid text"):
            check_labels(names)
    with pytest.raises(LabelError, match="is not valid text"):
        read_templates(["caf\udce9 {}"])


def test_labels_and_templates_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, "\ufeff猫\r\ndog".encode())
    assert read_labels("-") == [Label("猫"), Label("dog")]
    feed_stdin(monkeypatch, b"a {}.\nmy {}\n")
    assert read_templates(["the {}", "-"]) == ["the {}", "a {}.", "my {}"]
    feed_stdin(monkeypatch, b"cat\ncat")
    with pytest.raises(LabelError, match=r"^stdin:2: label 'cat' is already on line 1"):
        read_labels(Path("-"))
    feed_stdin(monkeypatch, b"")
    with pytest.raises(LabelError, match=r"^stdin: no template"):
        read_templates(["-"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_labels_and_templates_from_pipes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def feed(text: str) -> None:
        threading.Thread(target=pipe.write_text, args=(text,), daemon=True).start()

    feed("cat\ndog\n")
    assert read_labels(pipe) == [Label("cat"), Label("dog")]
    feed("a {}.\nmy {}\n")
    assert read_templates([str(pipe)]) == ["a {}.", "my {}"]


def test_unreadable_label_files(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="No such file"):
        read_labels(tmp_path / "none.txt")
    with pytest.raises(LabelError, match="not UTF-8"):
        read_labels(write(tmp_path, "Käse\n", "latin-1"))
    with pytest.raises(LabelError, match="directory"):
        read_labels(tmp_path)


def test_label_lists() -> None:
    assert check_labels([" cat ", Label("dog")]) == [Label("cat"), Label("dog")]
    for names, message in (([], "no labels"), (["a", "a"], "there twice"), ([" "], "empty")):
        with pytest.raises(LabelError, match=message):
            check_labels(names)
    with pytest.raises(TypeError, match="a list of names"):
        check_labels("labels.txt")
    with pytest.raises(TypeError, match="must be a tuple of texts"):
        check_labels([Label("a", "prompt")])
    with pytest.raises(LabelError, match="there twice"):
        check_labels([Label(" a "), "a"])


def test_wording() -> None:
    assert Label("cat").worded(["a {}.", "{} and {}"]) == ["a cat.", "cat and cat"]
    assert Label("c{0}at").worded(["a {}"]) == ["a c{0}at"]
    assert Label("cat", ("one", "two")).worded(["a {}."]) == ["one", "two"]
    assert Label("cat", ("my {}", "{}, {}")).worded(["a {}."]) == ["my cat", "cat, cat"]
    assert Label("{} {}", ("my {}",)).worded(["a {}."]) == ["my {} {}"]
    assert Label("{}").worded(["a {}."]) == ["a {}."]


def test_templates(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_bytes("\ufeff# mine\r\n\r\na {}.\r\\#1 {} | x\u2028y\n".encode())
    assert read_templates(["my {}", str(path)]) == ["my {}", "a {}.", "#1 {} | x\u2028y"]
    with pytest.raises(LabelError, match="directory"):
        read_templates([str(tmp_path)])
    with pytest.raises(LabelError, match=r"has no \{\} for the class name, and is not a file"):
        read_templates(["a photo"])
    path.write_text("a photo\n")
    with pytest.raises(LabelError, match=r"has no \{\}"):
        read_templates([str(path)])
    path.write_text("\n")
    with pytest.raises(LabelError, match="no template"):
        read_templates([str(path)])
