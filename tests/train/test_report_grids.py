"""Tables of one model's accuracy by purification setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.robustness.reports import diff_rows, grid, printed, rows


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.report.MIN_IMAGES", 1)


def test_grid_of_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, before = "1" * 100, "1" * 40 + "0" * 60
    files = grid(
        tmp_path,
        {
            None: (clean, before),
            (10, 30.0): (clean, before),
            (2, 30.0): (clean[:98] + "00", "1" * 55 + "0" * 45),
            (2, 0.1): (clean, "0" * 10 + "1" * 35 + "0" * 55),
        },
    )
    text = printed(capsys, *files)
    head = "runs/m, CLIPure-Cos, clean / worst case in % (pgd; 100 steps; restarts 1)"
    assert f"{head}; without purification 100.0 / 40.0:" in text
    assert [
        line for line in text.splitlines() if line.startswith(("| steps", "| 2 |", "| 10 |"))
    ] == [
        "| steps | step size 0.1 | step size 30 |",
        "| 2 | 100.0 / 35.0 | 98.0 / 55.0 |",
        "| 10 |  | 100.0 / 40.0 |",
    ]
    # 15 of 100 images are gained, none is lost: 1.96 sqrt(0.15 - 0.15^2) / 10 = 0.070.
    assert text.splitlines()[-1] == (
        "Of 3 settings cos 2 x 30 has the largest gain: worst case +15.0 points ± 7.0 over no "
        "purification (95 % interval of the paired difference, 100 images); clean accuracy -2.0 "
        "points."
    )
    assert f"{head}; no result without purification:" in printed(capsys, *files[1:])
    assert "CLIPure-Cos" not in printed(capsys, *files[:2])


def test_gain_within_sampling_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, before = "1" * 100, "1" * 40 + "0" * 60
    gained = "0" * 5 + "1" * 42 + "0" * 53  # 7 gained, 5 lost: 2 +- 6.8
    files = grid(
        tmp_path,
        {
            None: (clean, before),
            (1, 1.0): (clean, gained[:50] + "?" * 50),
            (2, 1.0): (clean, "0" * 100),
        },
    )
    conclusion = printed(capsys, *files).splitlines()[-1]
    assert "cos 1 x 1 has the largest gain: worst case +4.0 points ± 13.5" in conclusion
    assert "50 images), within sampling error; clean accuracy +0.0 points." in conclusion
    files = grid(
        tmp_path, {None: (clean, before), (1, 1.0): (clean, "0" * 100), (2, 1.0): (clean, before)}
    )
    conclusion = printed(capsys, *files).splitlines()[-1]
    assert "cos 2 x 1 comes closest, none gains: worst case +0.0 points ± 0.0" in conclusion
    assert "within sampling error" in conclusion


def test_grids_of_diff_and_cos_are_separate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, *diff_rows(tmp_path))
    shared = "clean / worst case in % (pgd; 100 steps; restarts 1); without purification"
    cos = text.index(f"runs/m, CLIPure-Cos, {shared} 100.0 / 40.0:")
    diff = text.index(f"runs/m, CLIPure-Diff, timesteps 900 to 999, seed 0, {shared} 100.0 / 40.0:")
    assert cos < diff
    below = text[diff:].splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in below if "|" in line]
    assert table[0] == ["steps", "step size 0.1", "step size 30"]
    assert table[2] == ["10", "100.0 / 55.0", "100.0 / 50.0"]  # the worse of two results
    between = text[cos:diff]
    assert "50.0" not in between
    assert "55.0" not in between
    assert "seed 1, clean" not in text  # a single setting makes no grid


def test_rows_of_diff_name_their_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *diff_rows(tmp_path))
    named = [row[1] for row in rows(text, "runs/m")]
    assert named == [
        "none", "cos 2 x 30", "cos 10 x 30", "diff 10 x 0.1 t 900-999 seed 0",
        "diff 10 x 0.1 t 900-999 seed 0", "diff 10 x 30 t 900-999 seed 0",
        "diff 10 x 30 t 900-999 seed 1",
    ]  # fmt: skip
