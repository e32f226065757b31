"""Tables that hold what the result files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.report import MARKS, main
from train.settings import SettingsError


def result(folder: Path, name: str, worst: float, **changes: object) -> str:
    settings = {
        "subject": f"runs/{name}", "data": "some", "samples": 8, "norm": "linf", "eps": 8 / 255,
        "steps": 100, "restarts": 1, "seed": 0,
    } | changes  # fmt: skip
    found = {
        "settings": settings,
        "clean_accuracy": 0.875,
        "results": [{"attack": "apgd-ce", "robust_accuracy": worst + 0.125}],
        "worst_case_accuracy": worst,
    }
    if name == "b":
        found["results"].append({"attack": "pgd", "robust_accuracy": 0.5})  # type: ignore[attr-defined]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(found))
    return str(path)


def test_tables_hold_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [result(tmp_path, "a", 0.25), result(tmp_path, "b", 0.375)]
    files.append(result(tmp_path, "c", 0.0, eps=16 / 255))
    main(files)
    assert capsys.readouterr().out.splitlines() == [
        (
            "some, 8 test images, linf eps 8/255, 100 steps, restarts 1, seed 0; "
            "white box, accuracy in %:"
        ),
        "",
        "| model | clean | apgd-ce | pgd | worst case |",
        "|---|---|---|---|---|",
        "| runs/a | 87.5 | 37.5 |  | 25.0 |",
        "| runs/b | 87.5 | 50.0 | 50.0 | 37.5 |",
        "",
        (
            "some, 8 test images, linf eps 16/255, 100 steps, restarts 1, seed 0; "
            "white box, accuracy in %:"
        ),
        "",
        "| model | clean | apgd-ce | worst case |",
        "|---|---|---|---|",
        "| runs/c | 87.5 | 12.5 | 0.0 |",
    ]


def test_first_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(result(tmp_path, "a", 0.25, attack=["apgd-ce"]))
    found = json.loads(path.read_text())
    found["samples"] = {"clean": "11101111", "apgd-ce": "01100000"}
    path.write_text(json.dumps(found))
    main([str(path), "--samples", "4"])
    shown = capsys.readouterr().out
    assert shown.startswith("some, 4 test images")
    assert "| runs/a | 75.0 | 50.0 | 50.0 |" in shown
    with pytest.raises(SettingsError, match="was measured on 8 images only"):
        main([str(path), "--samples", "9"])


def test_document_keeps_all_else(tmp_path: Path) -> None:
    file, document = result(tmp_path, "a", 0.25), tmp_path / "doc.md"
    document.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    main([file, "--into", str(document)])
    text = document.read_text()
    assert text.startswith(f"before\n{MARKS[0]}\nsome, 8 test images")
    assert text.endswith(f"25.0 |\n{MARKS[1]}\nafter\n")
    main([file, "--into", str(document)])
    assert document.read_text() == text


def test_unusable_files(tmp_path: Path) -> None:
    file, document = result(tmp_path, "a", 0.25), tmp_path / "doc.md"
    document.write_text("no marks")
    with pytest.raises(SettingsError, match="needs one line"):
        main([file, "--into", str(document)])
    with pytest.raises(SettingsError, match="is no result"):
        main([str(tmp_path / "missing.json")])
    (tmp_path / "half.json").write_text('{"settings": {}}')
    with pytest.raises(SettingsError, match="is not finished"):
        main([str(tmp_path / "half.json")])
