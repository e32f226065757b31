"""Tables and plots of the marks in result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from edgeclip import EdgeclipError
from train.errors import SettingsError
from train.report import BLOCK, main

MARKS = (f"<!-- {BLOCK} -->", f"<!-- /{BLOCK} -->")
PASSED = [{"name": f"name {i}", "passed": True, "figure": f"{i}.5 %"} for i in range(1, 11)]
NOTE = "± is half the width of the 95 % Wilson interval of the worst case."
COS = {"steps": 10, "step_size": 30.0}


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.report.MIN_IMAGES", 1)


def test_few_images_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.report.MIN_IMAGES", 9)
    text = shown(capsys, plain(tmp_path / "few.json", "1" * 8, "1" * 8))
    assert rows(text, "runs/few")[0][2] == "**8**"
    assert "A **bold n** is below 9: a first look." in text
    text = shown(capsys, plain(tmp_path / "many.json", "1" * 9, "1" * 9))
    assert rows(text, "runs/many")[0][2] == "9"
    assert "bold n" not in text


def result(path: Path, samples: dict[str, str], **changes: Any) -> str:
    """Write a result file; changes are of the settings, but for checks, seconds and devices."""
    rest = {"checks": PASSED, "agreement": None, "seconds": {}, "devices": ["some GPU"]}
    rest |= {name: changes.pop(name) for name in tuple(rest) if name in changes}
    attacked = [key.split("/") for key in samples if key != "clean"]
    settings = {
        "subject": f"runs/{path.stem}", "checkpoint": None, "pretrained": None,
        "weights_sha256": path.stem, "data": "some", "purification": None,
        "visual": None, "quick_gelu": False, "templates": ["a {}"],
        "attack": list(dict.fromkeys(key[0] for key in attacked)),
        "gradient": list(dict.fromkeys(key[-1] for key in attacked)),
        "norm": "linf", "eps": 8 / 255, "steps": 100, "restarts": 1, "queries": 5000, "eot": 1,
        "samples": len(samples["clean"]), "seed": 0,
    } | changes  # fmt: skip
    path.write_text(json.dumps({"settings": settings, **rest, "samples": samples}))
    return str(path)


def plain(path: Path, clean: str, attacked: str, **changes: Any) -> str:
    return result(path, {"clean": clean, "pgd/exact": attacked}, **changes)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    main(words)
    return capsys.readouterr().out


def rows(text: str, start: str) -> list[list[str]]:
    """Return the cells of the table rows whose first cell is `start`."""
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines()]
    return [row for row in cells if row[0] == start]


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
        plain(tmp_path / "c.json", "11110000", "11000000", eps=0.5, norm="l2", seed=3),
    ]
    # Wilson's interval of 2 of 8 is 7.1 to 59.1 %, of 0 of 8 0.0 to 32.4 %.
    assert shown(capsys, *files).splitlines() == [
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
def test_doubt_cannot_be_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], checks: Any, verdict: str
) -> None:
    files = [
        plain(tmp_path / "a.json", "1111", "1100", checks=checks),
        plain(tmp_path / "b.json", "1111", "1100"),
    ]
    text = shown(capsys, *files)
    (doubted,), (believed,) = rows(text, "runs/a"), rows(text, "runs/b")
    assert doubted[-1].rstrip(" |") == f"**{verdict}**"
    assert doubted[5] == f"**! {believed[5]} !**"
    assert "do not rely on it" in text
    brief = shown(capsys, *files, "--brief")
    assert "| **! 50.0 ± 35.0 !** |" in brief
    assert f"{verdict}: runs/a." in brief
    assert "do not rely on it" not in shown(capsys, files[1])


def test_checks_that_do_not_apply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [*PASSED[:8], *(c | {"passed": None} for c in PASSED[8:])]
    text = shown(capsys, plain(tmp_path / "a.json", "11", "10", checks=checks))
    assert text.splitlines()[4].endswith("| 8/8 passed, 2 n/a |")
    assert "!" not in text


def test_failed_checks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        PASSED[0],
        PASSED[1] | {"passed": None},
        *PASSED[2:4],
        {"name": "Square", "passed": False, "figure": "a | b\nc"},
        *PASSED[5:],
    ]
    words = plain(tmp_path / "a.json", "11", "10", purification=COS, checks=checks), "--checks"
    text = shown(capsys, words[0])
    assert "\n- runs/a, cos 10 x 30: check 5 Square: a | b c\n" in text
    assert "name 1:" not in text
    whole = shown(capsys, *words)
    assert "| runs/a | cos 10 x 30 | 2 | n/a | name 2: 2.5 % |" in whole
    assert "| runs/a | cos 10 x 30 | 5 | **NO** | Square: a \\| b c |" in whole
    assert "| runs/a | cos 10 x 30 | 10 | yes | name 10: 10.5 % |" in whole


def test_partial_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = plain(tmp_path / "a.json", "110111??", "1?010100")
    (row,) = rows(shown(capsys, file), "runs/a")
    assert row[2:5] == ["5 of 8", "80.0", "60.0"]  # places 0, 2, 3, 4 and 5
    with pytest.raises(SettingsError, match="of its first 3 images only 2 are finished"):
        main([file, "--samples", "3"])
    assert rows(shown(capsys, file, "--samples", "1"), "runs/a")[0][2:5] == ["1", "100.0", "100.0"]
    waiting = plain(tmp_path / "b.json", "11", "??")
    with pytest.raises(SettingsError, match=r"b\.json: no image is finished yet"):
        main([waiting])


def test_first_images_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = plain(tmp_path / "a.json", "11101111", "01100000")
    (row,) = rows(shown(capsys, file, "--samples", "4", "--brief"), "runs/a")
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
        plain(tmp_path / "b.json", "1111", "1100"),
    ]
    text = shown(capsys, *files)
    assert "| model | purification | apgd-ce | square | seconds per image | on |" in text
    assert "\n| runs/a | none | 75.0 | 25.0 | 1.5 | some GPU |\n" in text
    assert "| autoattack, feature; 100 steps; 5000 queries; restarts 1 |" in text
    (first, *_) = rows(text, "runs/a")
    assert first[4:5] == ["0.0"]
    brief = shown(capsys, *files, "--brief")
    assert "| model | n | clean | autoattack | feature | pgd | worst case | attacks |" in brief
    assert [cells[3:6] for cells in rows(brief, "runs/a")] == [["25.0", "75.0", ""]]


def grid(folder: Path, worst: dict[tuple[int, float] | None, tuple[str, str]]) -> list[str]:
    return [
        plain(
            folder / f"{i}.json", clean, attacked, subject="runs/m", weights_sha256="m",
            purification=cos and {"steps": cos[0], "step_size": cos[1]},
        )
        for i, (cos, (clean, attacked)) in enumerate(worst.items())
    ]  # fmt: skip


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
    text = shown(capsys, *files)
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
    assert f"{head}; no result without purification:" in shown(capsys, *files[1:])
    assert "CLIPure-Cos" not in shown(capsys, *files[:2])


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
    told = shown(capsys, *files).splitlines()[-1]
    assert "cos 1 x 1 has the largest gain: worst case +4.0 points ± 13.5" in told
    assert "50 images), within sampling error; clean accuracy +0.0 points." in told
    files = grid(
        tmp_path, {None: (clean, before), (1, 1.0): (clean, "0" * 100), (2, 1.0): (clean, before)}
    )
    told = shown(capsys, *files).splitlines()[-1]
    assert "cos 2 x 1 comes closest, none gains: worst case +0.0 points ± 0.0" in told
    assert "within sampling error" in told


def test_models_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = plain(tmp_path / "a.json", "11", "10", subject="bundles/x", checkpoint="runs/y")
    assert rows(shown(capsys, file), "bundles/x (runs/y)")


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
        plain(tmp_path / "a.json", "1111", "1000"),
        result(tmp_path / "b.json", both, subject="runs/a", purification=COS),
        plain(tmp_path / "c.json", "1110", "1110", subject="runs/a", eps=2 / 255, checks=[]),
        plain(tmp_path / "d.json", "1110", "1110", norm="l2", eps=2 / 255),  # no other point
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


def test_document_keeps_all_else(tmp_path: Path) -> None:
    file, document = plain(tmp_path / "a.json", "1111", "1100"), tmp_path / "doc.md"
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
    file, other = plain(tmp_path / "a.json", "1111", "1100"), tmp_path / "other"
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
            main([plain(tmp_path / "c.json", "11", "10", checks=[check])])


def test_help_shows_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--into docs/training.md" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["a.json", "--brief", "--checks"])
    assert capsys.readouterr().err.startswith("error: ")


DIFF = {
    "method": "diff", "steps": 10, "step_size": 30.0, "timesteps": [900, 999], "seed": 0,
    "prior_sha256": "p", "gradient": "exact",
}  # fmt: skip


def diff_rows(folder: Path) -> list[str]:
    """Write results of a model without purification, with two settings of cos, and with two of diff."""
    clean = "1" * 100
    given = [
        (None, 40), (COS, 41), (COS | {"steps": 2}, 42), (DIFF, 50), (DIFF | {"step_size": 0.1}, 60),
        (DIFF | {"seed": 1}, 70), (DIFF | {"step_size": 0.1}, 55),
    ]  # fmt: skip
    return [
        plain(
            folder / f"{i}.json", clean, "1" * left + "0" * (100 - left),
            subject="runs/m", weights_sha256="m", purification=purification,
        )
        for i, (purification, left) in enumerate(given)
    ]  # fmt: skip


def test_grid_of_diff_is_apart_from_that_of_cos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, *diff_rows(tmp_path))
    shared = "clean / worst case in % (pgd; 100 steps; restarts 1); without purification"
    cos = text.index(f"runs/m, CLIPure-Cos, {shared} 100.0 / 40.0:")
    diff = text.index(f"runs/m, CLIPure-Diff, timesteps 900 to 999, seed 0, {shared} 100.0 / 40.0:")
    assert cos < diff
    below = text[diff:].splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in below if "|" in line]
    assert table[0] == ["steps", "step size 0.1", "step size 30"]
    assert table[2] == ["10", "100.0 / 55.0", "100.0 / 50.0"]  # of two results the worse
    between = text[cos:diff]
    assert "50.0" not in between
    assert "55.0" not in between
    assert "seed 1, clean" not in text  # a single setting makes no grid


def test_rows_of_diff_name_their_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, *diff_rows(tmp_path))
    named = [row[1] for row in rows(text, "runs/m")]
    assert named == [
        "none", "cos 2 x 30", "cos 10 x 30", "diff 10 x 0.1 t 900-999 seed 0",
        "diff 10 x 0.1 t 900-999 seed 0", "diff 10 x 30 t 900-999 seed 0",
        "diff 10 x 30 t 900-999 seed 1",
    ]  # fmt: skip


def test_diff_has_its_place_in_the_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    main([*diff_rows(tmp_path), "--plots", str(tmp_path / "plots")])
    labels = [
        label.get_text() for figure in figures for axes in figure.axes for label in axes.texts
    ]
    assert any("diff" in label for label in labels)


def test_purifications_that_make_no_sense(tmp_path: Path) -> None:
    for bad in (DIFF | {"method": "best"}, {"method": "diff", "steps": 1, "step_size": 1.0}):
        with pytest.raises(SettingsError, match=r"a\.json is no result"):
            main([plain(tmp_path / "a.json", "11", "10", purification=bad)])
