"""Accuracy under attack: right on models whose robustness is known, and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import write_folder

from edgeclip import LabelError
from export import ExportError
from export.checkpoints import load
from train import data, evaluate
from train.evaluate import build_attack, build_parser
from train.fashion import FASHION_CLASSES
from train.model import Classifier, Pictures, batches, class_embeddings, draw
from train.settings import SettingsError

SMALL = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "subject", "vit", **SMALL)


@pytest.fixture
def words(subject: Path, fashion_folder: Path, tmp_path: Path) -> list[str]:
    line = f"{subject} --data fashion-mnist:{fashion_folder} --eps 4/255 --steps 3 -n 40"
    return [*line.split(), "--batch-size", "16", "--out", str(tmp_path / "found.json")]


def run(words: list[str], *more: str) -> dict[str, Any]:
    args = build_parser().parse_args([*words, *more])
    evaluate.main(args)
    return json.loads(args.out.read_text())


def test_every_attack_has_its_row(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    attacks = ["apgd-ce", "apgd-t", "pgd", "cw"]
    found = run(words, "--attack", *attacks)
    assert [row["attack"] for row in found["results"]] == attacks
    robust = [row["robust_accuracy"] for row in found["results"]]
    assert all(accuracy <= found["clean_accuracy"] for accuracy in robust)
    assert found["worst_case_accuracy"] <= min(robust)
    marks = np.array([[mark == "1" for mark in row] for row in found["samples"].values()])
    assert marks.shape == (5, 40)
    assert found["worst_case_accuracy"] == pytest.approx(marks.all(0).mean())
    assert found["settings"]["samples"] == 40
    shown = capsys.readouterr().out
    assert f"{found['worst_case_accuracy']:.2%}" in shown
    assert "linf eps 4/255" in shown


def test_clean_accuracy_equals_a_plain_loop(words: list[str], subject: Path) -> None:
    found = run(words, "--attack", "pgd", "--template", "a {}", "--template", "the {}")
    source = load(str(subject), None)
    test_set = data.load(words[2], train=False)
    model = Classifier(source, class_embeddings(source, test_set.classes, ["a {}", "the {}"]))
    keys = draw(len(test_set), 40, seed=0)
    ((images, labels, _),) = batches(Pictures(test_set, source.model.visual), [keys], 0)
    with torch.no_grad():
        right = model.eval()(images).logits.argmax(1) == labels
    assert found["clean_accuracy"] == pytest.approx(right.float().mean().item())
    assert found["samples"]["clean"] == "".join(str(int(mark)) for mark in right)


def test_no_room_to_move_changes_nothing(words: list[str]) -> None:
    found = run(words, "--eps", "0", "--attack", "apgd-ce", "pgd")
    assert found["worst_case_accuracy"] == found["clean_accuracy"]


def test_all_of_the_range_fools_every_image(words: list[str]) -> None:
    found = run(words, "--eps", "0.9", "--steps", "20", "--attack", "apgd-ce")
    assert found["worst_case_accuracy"] <= 0.05


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "pgd", "cw"])
def test_attacks_stay_within_eps(words: list[str], name: str, norm: str, subject: Path) -> None:
    source = load(str(subject), None)
    classes = class_embeddings(source, FASHION_CLASSES, ["a {}"])
    args = build_parser().parse_args([*words, "--norm", norm, "--eps", "0.1"])
    attack = build_attack(name, Classifier(source, classes).eval(), args)
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = attack(images, torch.arange(5), torch.arange(5))
    moved = (found - images).flatten(1)
    size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert (size <= 0.1 + 1e-5).all()
    assert 0 <= found.min() <= found.max() <= 1


def test_killed_evaluation_goes_on(words: list[str]) -> None:
    whole = run(words)
    path = Path(words[-1])
    half = dict(
        whole, samples=dict(whole["samples"], **{"apgd-t": whole["samples"]["apgd-t"][:16]})
    )
    # What was found is kept, not computed again: a mark that no attack would leave stays.
    half["samples"]["clean"] = "0" * 40
    path.write_text(json.dumps(half))
    again = run(words)
    assert again["clean_accuracy"] == 0
    assert again["samples"]["apgd-t"] == whole["samples"]["apgd-t"]
    assert again["results"] == whole["results"]


def test_results_of_other_settings_are_not_mixed(words: list[str]) -> None:
    run(words, "--attack", "pgd")
    with pytest.raises(SettingsError, match=r"other settings \(attack, eps\)"):
        run(words, "--attack", "pgd", "cw", "--eps", "8/255")
    Path(words[-1]).write_text("{}")
    with pytest.raises(SettingsError, match="is not a result file"):
        run(words)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eps", "8"], r"--eps is in units of \[0, 1\], got 8: for 8 of 255 give --eps 8/255"),
        (["--eps=-0.1"], "--eps"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["-n", "0"], "--samples must be 1 or more"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
    ],
)
def test_bad_settings(words: list[str], more: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(words, *more)


def test_larger_perturbations_of_l2_are_allowed(words: list[str]) -> None:
    found = run(words, "--norm", "l2", "--eps", "2", "--attack", "pgd")
    assert found["settings"]["eps"] == 2


def test_bad_subjects_and_data(words: list[str]) -> None:
    with pytest.raises(LabelError, match="template"):
        run(words, "--template", "no place")
    with pytest.raises(SettingsError, match="is a folder"):
        run(words, "--out", str(Path(words[-1]).parent))
    with pytest.raises(ExportError, match="unknown model"):
        run(["nothing-of-this-name", *words[1:]])
    with pytest.raises(data.DataError, match="unknown data set"):
        run(words, "--data", "mnist-of-mars")
