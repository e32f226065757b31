"""Generated blocks of documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.documents import update
from train.errors import SettingsError


def test_text_outside_the_blocks_stays(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    first, second = "<!-- x.a -->\n{}<!-- /x.a -->", "<!-- x.b-c -->\n{}<!-- /x.b-c -->"
    other = "<!-- y.a -->\nold\n<!-- /y.a -->"
    text = f"before\n{first}\nbetween\n{second}\n{other}\nafter\n"
    document.write_text(text.format("old\n", ""))
    for _ in range(2):
        assert update(document, "x.", lambda name: rf"\1 {name}") == 2
        assert document.read_text() == text.format("\\1 a\n", "\\1 b-c\n")


@pytest.mark.parametrize("text", ["none", "<!-- x -->\n", "<!-- x -->\n<!-- /y -->\n"])
def test_documents_without_a_block(tmp_path: Path, text: str) -> None:
    document = tmp_path / "doc.md"
    document.write_text(text)
    with pytest.raises(SettingsError, match="needs one line <!-- x -->"):
        update(document, "x", str)
    assert document.read_text() == text
    with pytest.raises(SettingsError, match="cannot read"):
        update(tmp_path / "missing.md", "x", str)


def test_nothing_is_written_before_all_blocks_are_rendered(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("<!-- x.a -->\n<!-- /x.a -->\n<!-- x.b -->\n<!-- /x.b -->\n")
    before = document.read_text()
    with pytest.raises(KeyError):
        update(document, "x.", {"a": "new"}.__getitem__)
    assert document.read_text() == before
