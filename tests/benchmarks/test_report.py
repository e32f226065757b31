"""The documents show what the benchmarks' JSON files say, and no figure of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.timing import publish
from train import documents

SHOWN = [
    (document, match[2], match[0])
    for document in report.DOCUMENTS
    for match in documents.marks(report.PREFIX).finditer(document.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(
    ("document", "name", "text"), SHOWN, ids=[f"{d.stem} {name}" for d, name, _ in SHOWN]
)
def test_tables_are_those_of_the_results(document: Path, name: str, text: str) -> None:
    begin, end = f"<!-- benchmarks.{name} -->\n", f"\n<!-- /benchmarks.{name} -->"
    assert text == f"{begin}{report.table(name)}{end}"


def test_every_result_is_shown() -> None:
    shown = {name for document, name, _ in SHOWN if document.stem == "PERFORMANCE"}
    results = {path.stem for path in report.RESULTS.glob("*.json")}
    assert shown == results | {"targets"}
    assert results >= report.RUNS.keys()


def test_targets_say_what_was_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in report.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    memory = json.loads((tmp_path / "memory.json").read_text())
    memory["mb"]["edgeclip int8"] = {"image encoder": [171, 0], "with the text encoder": [280, 0]}
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = report.targets().splitlines()
    assert "| int8, image encoder, resident | at most 170 MB | 171 MB | missed |" in lines
    assert "| int8, both encoders, resident | at most 280 MB | 280 MB |  |" in lines


def test_published_figures_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, link = tmp_path / "out.json", tmp_path / "link.json"
    path.touch(0o600)
    link.symlink_to("out.json")
    figures = {"machine": "é", "versions": {"torch": "2"}, "ms": [1.5, float("nan")]}
    publish(figures, lambda report: f"{len(report)} entries", link)
    assert capsys.readouterr().out == "é; torch 2.\n\n3 entries\n"
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found == figures | {"ms": [1.5, None]}
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
