"""Label files, templates, and the cache of text embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeclip import Label, LabelError, read_labels
from edgeclip.labels import check_labels, read_templates


def write(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "labels.txt"
    path.write_text(text, encoding=encoding)
    return path


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
        ("cat | \n", ":1: empty class name or prompt"),
        ("| a prompt\n", ":1: empty class name or prompt"),
    ],
)
def test_bad_label_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        read_labels(write(tmp_path, text))


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


def test_templates(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("# mine\n\na {}.\nthe {}\n")
    assert read_templates(["my {}", str(path)]) == ["my {}", "a {}.", "the {}"]
    with pytest.raises(LabelError, match=r"has no \{\} for the class name, and is not a file"):
        read_templates(["a photo"])
    path.write_text("a photo\n")
    with pytest.raises(LabelError, match=r"has no \{\}"):
        read_templates([str(path)])
    path.write_text("\n")
    with pytest.raises(LabelError, match="no template"):
        read_templates([str(path)])
