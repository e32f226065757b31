"""Tables of the marks in result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeclip import EdgeclipError
from tests.support.robustness.reports import (
    COS,
    DIFF,
    MARKS,
    NOTE,
    PASSED,
    pgd_result,
    printed,
    result,
    rows,
)
from train.errors import SettingsError
from train.report import main


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.report.MIN_IMAGES", 1)


def test_few_images_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.report.MIN_IMAGES", 9)
    text = printed(capsys, pgd_result(tmp_path / "few.json", "1" * 8, "1" * 8))
    assert rows(text, "runs/few")[0][2] == "**8**"
    assert "A **bold n** is below 9: a first look." in text
    text = printed(capsys, pgd_result(tmp_path / "many.json", "1" * 9, "1" * 9))
    assert rows(text, "runs/many")[0][2] == "9"
    assert "bold n" not in text


def test_table_of_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    purified = {
        "clean": "11111110",
        "pgd/exact": "11110010",
        "cw/exact": "11001110",  # both 5 of 8, but 3 of 8 withstand both
        "pgd/encoder": "01111110",
        "cw/encoder": "11111110",
        "pgd/released": "11111110",
        "cw/released": "11111110",
    }
    files = [
        result(
            tmp_path / "a.json", {"clean": "11111111", "pgd/exact": "1" * 8, "cw/exact": "0" * 8}
        ),
        result(tmp_path / "b.json", purified, purification=COS, eot=20),
        pgd_result(tmp_path / "c.json", "11110000", "11000000", eps=0.5, norm="l2", seed=3),
    ]
    # Wilson's interval of 2 of 8 is 7.1 to 59.1 %, of 0 of 8 0.0 to 32.4 %.
    assert printed(capsys, *files).splitlines() == [
        "some, linf eps 8/255, seed 0; white box, accuracy in %:",
        "",
        (
            "| model | purification | n | clean | exact | encoder | released | worst case | masking "
            "| attacks | checks |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
        (
            "| runs/a | none | 8 | 100.0 | 0.0 |  |  | 0.0 ± 16.2 |  "
            "| pgd, cw; 100 steps; restarts 1 | 10/10 passed |"
        ),
        (
            "| runs/b | cos 10 x 30 | 8 | 87.5 | 37.5 | 75.0 | 87.5 | 25.0 ± 26.0 | +50.0 "
            "| pgd, cw; 100 steps; EOT 20; restarts 1 | 10/10 passed |"
        ),
        "",
        NOTE,
        "",
        "some, l2 eps 0.5, seed 3; white box, accuracy in %:",
        "",
        "| model | purification | n | clean | exact | worst case | attacks | checks |",
        "|---|---|---|---|---|---|---|---|",
        (
            "| runs/c | none | 8 | 50.0 | 25.0 | 25.0 ± 26.0 | pgd; 100 steps; restarts 1 "
            "| 10/10 passed |"
        ),
        "",
        NOTE,
    ]


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ([], "NOT CHECKED"),
        (PASSED[:9], "UNFINISHED"),
        ([c | {"passed": i not in (4, 6)} for i, c in enumerate(PASSED)], "FAILED: 5, 7"),
        ([PASSED[0], PASSED[1] | {"passed": False}], "FAILED: 2; UNFINISHED"),
    ],
)
def test_doubtful_figures_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checks: Any, verdict: str
) -> None:
    files = [
        pgd_result(tmp_path / "a.json", "1111", "1100", checks=checks),
        pgd_result(tmp_path / "b.json", "1111", "1100"),
    ]
    text = printed(capsys, *files)
    (doubted,), (believed,) = rows(text, "runs/a"), rows(text, "runs/b")
    assert doubted[-1].rstrip(" |") == f"**{verdict}**"
    assert doubted[5] == f"**! {believed[5]} !**"
    assert "do not rely on it" in text
    brief = printed(capsys, *files, "--brief")
    assert "| **! 50.0 ± 35.0 !** |" in brief
    assert f"{verdict}: runs/a." in brief
    assert "do not rely on it" not in printed(capsys, files[1])


def test_checks_that_do_not_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [*PASSED[:8], *(c | {"passed": None} for c in PASSED[8:])]
    text = printed(capsys, pgd_result(tmp_path / "a.json", "11", "10", checks=checks))
    assert text.splitlines()[4].endswith("| 8/8 passed, 2 n/a |")
    assert "!" not in text


def test_failed_checks_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        PASSED[0],
        PASSED[1] | {"passed": None},
        *PASSED[2:4],
        {"name": "Square", "passed": False, "figure": "a | b\nc"},
        *PASSED[5:],
    ]
    words = pgd_result(tmp_path / "a.json", "11", "10", purification=COS, checks=checks), "--checks"
    text = printed(capsys, words[0])
    assert "\n- runs/a, cos 10 x 30: check 5 Square: a | b c\n" in text
    assert "name 1:" not in text
    whole = printed(capsys, *words)
    assert "| runs/a | cos 10 x 30 | 2 | n/a | name 2: 2.5 % |" in whole
    assert "| runs/a | cos 10 x 30 | 5 | **NO** | Square: a \\| b c |" in whole
    assert "| runs/a | cos 10 x 30 | 10 | yes | name 10: 10.5 % |" in whole


def test_partial_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pgd_result(tmp_path / "a.json", "110111??", "1?010100")
    (row,) = rows(printed(capsys, file), "runs/a")
    assert row[2:5] == ["5 of 8", "80.0", "60.0"]  # images 0, 2, 3, 4 and 5
    with pytest.raises(SettingsError, match="of its first 3 images only 2 are finished"):
        main([file, "--samples", "3"])
    assert rows(printed(capsys, file, "--samples", "1"), "runs/a")[0][2:5] == [
        "1",
        "100.0",
        "100.0",
    ]
    waiting = pgd_result(tmp_path / "b.json", "11", "??")
    with pytest.raises(SettingsError, match=r"b\.json: no image is finished yet"):
        main([waiting])


def test_first_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pgd_result(tmp_path / "a.json", "11101111", "01100000")
    (row,) = rows(printed(capsys, file, "--samples", "4", "--brief"), "runs/a")
    assert row[:4] == ["runs/a", "4", "75.0", "50.0"]
    with pytest.raises(SettingsError, match="of its first 9 images only 8 are finished"):
        main([file, "--samples", "9"])
    with pytest.raises(SettingsError, match="--samples must be 1 or more"):
        main([file, "--samples", "0"])


def test_autoattack_by_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {
        "clean": "1111",
        "autoattack/apgd-ce/exact": "1110",
        "autoattack/square/exact": "1000",
        "feature/exact": "0111",
    }
    seconds = {"clean": 9, "autoattack/apgd-ce/exact": 2.0, "autoattack/square/exact": 4.0}
    files = [
        result(tmp_path / "a.json", samples, seconds=seconds | {"feature/exact": 50}),
        pgd_result(tmp_path / "b.json", "1111", "1100"),
    ]
    text = printed(capsys, *files)
    assert "| model | purification | apgd-ce | square | seconds per image | on |" in text
    assert "\n| runs/a | none | 75.0 | 25.0 | 1.5 | some GPU |\n" in text
    assert "| autoattack, feature; 100 steps; 5000 queries; restarts 1 |" in text
    (first, *_) = rows(text, "runs/a")
    assert first[4:5] == ["0.0"]
    brief = printed(capsys, *files, "--brief")
    assert "| model | n | clean | autoattack | feature | pgd | worst case | attacks |" in brief
    assert [cells[3:6] for cells in rows(brief, "runs/a")] == [["25.0", "75.0", ""]]


def test_models_are_distinguished_by_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pgd_result(tmp_path / "a.json", "11", "10", subject="bundles/x", checkpoint="runs/y")
    assert rows(printed(capsys, file), "bundles/x (runs/y)")


def test_document_keeps_its_other_text(tmp_path: Path) -> None:
    file, document = pgd_result(tmp_path / "a.json", "1111", "1100"), tmp_path / "doc.md"
    document.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    main([file, "--into", str(document)])
    text = document.read_text()
    assert text.startswith(f"before\n{MARKS[0]}\nsome, linf eps 8/255")
    assert text.endswith(f"worst case.\n{MARKS[1]}\nafter\n")
    assert "old" not in text
    main([file, "--into", str(document)])
    assert document.read_text() == text


def test_result_is_not_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    path.write_text("<!-- train.report -->\n<!-- /train.report -->\n")
    with pytest.raises(EdgeclipError, match="that would destroy the input"):
        main([str(path), "--into", str(path)])


def test_unusable_files(tmp_path: Path) -> None:
    file, other = pgd_result(tmp_path / "a.json", "1111", "1100"), tmp_path / "other"
    other.write_text("no marks")
    with pytest.raises(SettingsError, match="needs one line"):
        main([file, "--into", str(other)])
    for text, why in {
        "no JSON": "Expecting value",
        "[]": "list indices",
        '{"settings": {}}': "no 'samples'",
        '{"settings": {"subject": "a"}, "samples": {}}': "no pretrained, visual",
    }.items():
        other.write_text(text)
        with pytest.raises(SettingsError, match=f"is no result of python -m train.evaluate: {why}"):
            main([str(other)])
    with pytest.raises(SettingsError, match=r"missing\.json is no result"):
        main([str(tmp_path / "missing.json")])
    for samples in ({"clean": "11", "pgd/exact": "1x"}, {"clean": "11", "pgd/exact": "111"}):
        with pytest.raises(SettingsError, match="for each image"):
            main([result(tmp_path / "b.json", samples)])
    for check in ({"name": "a", "figure": ""}, {"name": "a", "passed": True}):
        with pytest.raises(SettingsError, match=r"c\.json is no result"):
            main([pgd_result(tmp_path / "c.json", "11", "10", checks=[check])])


def test_help_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--into docs/training.md" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["a.json", "--brief", "--checks"])
    assert capsys.readouterr().err.startswith("error: ")


def test_purifications_that_make_no_sense(tmp_path: Path) -> None:
    for bad in (DIFF | {"method": "best"}, {"method": "diff", "steps": 1, "step_size": 1.0}):
        with pytest.raises(SettingsError, match=r"a\.json is no result"):
            main([pgd_result(tmp_path / "a.json", "11", "10", purification=bad)])
