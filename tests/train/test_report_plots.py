"""Plots of the marks in result files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tests.support.robustness.reports import COS, MARKS, diff_rows, grid, pgd_result, result
from train.errors import SettingsError
from train.report import main


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.report.MIN_IMAGES", 1)


def check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 600 < picture.width < 2000
        assert 400 < picture.height < 2000
        pixels = np.asarray(picture.convert("L"))
    assert 0.01 < (pixels < 250).mean() < 0.5


def test_plots_and_their_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, document = tmp_path / "docs" / "the plots", tmp_path / "docs" / "doc.md"
    both = {"clean": "1111", "pgd/exact": "1100", "pgd/released": "1110"}
    files = [
        pgd_result(tmp_path / "a.json", "1111", "1000"),
        result(tmp_path / "b.json", both, subject="runs/a", purification=COS),
        pgd_result(tmp_path / "c.json", "1110", "1110", subject="runs/a", eps=2 / 255, checks=[]),
        pgd_result(tmp_path / "d.json", "1110", "1110", norm="l2", eps=2 / 255),  # no other point
    ]
    main([*files, "--plots", str(folder)])
    names = [
        "eps-some-linf-runs-a-none.png",
        "frontier-some-linf-8-255.png",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        check_picture(folder / name)
    assert "![" not in capsys.readouterr().out
    document.write_text(f"{MARKS[0]}\n{MARKS[1]}\n")
    main([*files, "--plots", str(folder), "--into", str(document)])
    assert [line for line in document.read_text().splitlines() if line.startswith("![")] == [
        (
            "![some, linf eps 8/255, seed 0: clean against worst-case accuracy, the highest worst case "
            "50.0 % by runs/a, cos 10 x 30](the%20plots/frontier-some-linf-8-255.png)"
        ),
        (
            "![some, runs/a: accuracy by eps (linf), worst case 75.0 % at 2/255, 25.0 % at 8/255]"
            "(the%20plots/eps-some-linf-runs-a-none.png)"
        ),
    ]
    with pytest.raises(SettingsError, match="--plots names a folder"):
        main([*files, "--plots", str(document)])


def test_labels_of_many_points_lie_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {None: ("1" * 200, "0" * 200)}
    for i in range(30):  # every setting twice at one point, and all of them close
        right = 100 + i // 2 * 3 % 20
        marks[(i, 1.0)] = (
            "1" * (190 - i // 2) + "0" * (10 + i // 2),
            "1" * right + "0" * (200 - right),
        )
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    main([*grid(tmp_path, marks), "--plots", str(tmp_path / "plots")])
    check_picture(tmp_path / "plots" / "frontier-some-linf-8-255.png")
    (axes,) = figures[0].axes
    assert 3 <= len(axes.texts) <= 12
    assert all("and 1 more" in label.get_text() for label in axes.texts)
    boxes = [Text.get_window_extent(label) for label in axes.texts]  # without their lines
    assert not any(box.count_overlaps(boxes[:i]) for i, box in enumerate(boxes))


def test_diff_has_its_place_in_the_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    main([*diff_rows(tmp_path), "--plots", str(tmp_path / "plots")])
    labels = [
        label.get_text() for figure in figures for axes in figure.axes for label in axes.texts
    ]
    assert any("diff" in label for label in labels)
