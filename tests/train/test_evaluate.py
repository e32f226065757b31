"""Evaluation under attack as a whole, on a tiny CLIP and a few images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeclip import EdgeclipError, LabelError
from tests.support.data_sets import cifar10
from tests.support.evaluation import SMALL, command, marks, run
from tests.support.export_models import write_folder
from train import evaluate
from train.data import dataset
from train.data.loader import Pictures, batches, draw
from train.errors import DataError, ModelError, SettingsError
from train.evaluate import build_parser
from train.models.checkpoints import load
from train.models.classifier import Classifier, class_embeddings
from train.robustness.protocols import PROTOCOLS


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "subject", "vit", **SMALL)


@pytest.fixture
def words(subject: Path, fashion_folder: Path, tmp_path: Path) -> list[str]:
    return command(subject, fashion_folder, tmp_path / "result.json")


MODES = ["exact", "identity", "encoder", "released"]


def test_every_attack_has_its_row(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    attacks = ["autoattack", "apgd-ce", "apgd-t", "fab-t", "square", "pgd", "cw", "feature"]
    found = run(words, "--attack", *attacks)
    assert [row["attack"] for row in found["results"]] == attacks
    assert {(row["gradient"], row["norm"], row["eps"]) for row in found["results"]} == {
        ("exact", "linf", 4 / 255)
    }
    robust = [row["robust_accuracy"] for row in found["results"]]
    assert all(accuracy <= found["clean_accuracy"] for accuracy in robust)
    assert found["worst_case_accuracy"] == pytest.approx(marks(found).all(0).mean())
    assert found["worst_case_accuracy"] <= min(robust)
    assert found["masking"] is None
    assert found["finished"] == found["settings"]["samples"] == 40
    stages = found["results"][0]["stages"]
    assert list(stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(stages.values()) == sorted(stages.values(), reverse=True)
    assert stages["square"] == found["results"][0]["robust_accuracy"]
    assert stages["apgd-ce"] == found["results"][1]["robust_accuracy"]
    assert set(found["seconds"]) == set(found["samples"])
    shown = capsys.readouterr().out
    assert f"{found['worst_case_accuracy']:.2%}" in shown
    assert "linf eps 4/255" in shown
    assert "NO CHECK WAS RUN" in shown


def test_every_gradient_has_its_rows(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(words, "--attack", "pgd", "square", "--purify", "cos", "--purify-step-size", "0.1")
    rows = [(row["attack"], row["gradient"]) for row in found["results"]]
    assert rows == [("pgd", "exact"), ("square", "exact"), *(("pgd", mode) for mode in MODES[1:])]
    assert found["settings"]["purification"] == {"steps": 10, "step_size": 0.1}
    released = marks(found, "pgd/released").mean()
    others = [marks(found, "pgd/exact", "square/exact").all(0).mean()]
    others += [marks(found, f"pgd/{mode}").mean() for mode in ("identity", "encoder")]
    assert found["masking"] == pytest.approx(released - min(others))
    assert found["worst_case_accuracy"] == pytest.approx(marks(found).all(0).mean())
    shown = " ".join(capsys.readouterr().out.split())
    assert f"masking │ │ {100 * found['masking']:+.2f} points" in shown


def test_clean_accuracy_equals_a_plain_loop(words: list[str], subject: Path) -> None:
    found = run(words, "--attack", "pgd", "--template", "a {}", "--template", "the {}")
    source = load(str(subject), None)
    test_set = dataset.load(words[2], train=False)
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


def test_square_alone_masks_nothing(words: list[str]) -> None:
    found = run(words, "--attack", "square", "--purify", "cos")
    assert [row["gradient"] for row in found["results"]] == ["exact"]
    assert found["masking"] is None


def test_other_model_of_another_size_is_refused(words: list[str], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", "vit")
    with pytest.raises(SettingsError, match="takes images of another size"):
        run(words, "--transfer-from", str(other))


def test_another_model_is_tried(words: list[str], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", "vit", seed=2, **SMALL)
    found = run(words, "--check-samples", "8", "--transfer-from", str(other), "--attack", "pgd")
    (row,) = (row for row in found["checks"] if row["name"] == "transfer is weaker")
    assert "from another model" in row["figure"]


def test_protocol_measures_each_of_its_data_sets(
    subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("EDGECLIP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    (tmp_path / "data").mkdir()
    cifar10(tmp_path / "data")
    small = replace(PROTOCOLS["clipure-cifar10"], attacks=("pgd",), steps=2, samples=5)
    monkeypatch.setitem(PROTOCOLS, "clipure-cifar10", small)
    both = replace(small, data=("cifar10", "stl10"))
    monkeypatch.setitem(PROTOCOLS, "clipure-13", both)
    words = [str(subject), "--check-samples", "0", "--out", str(tmp_path / "out")]

    def follow(*more: str) -> None:
        evaluate.main(build_parser().parse_args([*words, *more]))

    with pytest.raises(SettingsError, match="1 of the 2 data sets of clipure-13 are missing"):
        follow("--protocol", "clipure-13")
    assert "no STL-10 in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    follow("--protocol", "clipure-13", "--skip-missing", "--steps", "1")
    names = ["cifar10-l2-0.5.json", "cifar10-linf-8.json"]
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert sorted(found) == names
    settings = [found[name]["settings"] for name in names]
    assert [(row["norm"], row["eps"]) for row in settings] == [("l2", 0.5), ("linf", 8 / 255)]
    for row in settings:
        assert (row["attack"], row["steps"], row["data"]) == (["pgd"], 1, "cifar10")
        assert row["templates"] == ["a photo of a {}."]
        assert row["purification"] == {"steps": 10, "step_size": 30.0}
    capsys.readouterr()
    follow("--protocol", "clipure-13", "--list")
    assert "no STL-10 in" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="omit --data and --eps"):
        follow("--protocol", "clipure-13", "--eps", "1/255")
    with pytest.raises(SettingsError, match="unknown protocol 'clipure', did you mean"):
        follow("--protocol", "clipure")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eps", "8"], r"--eps is in units of \[0, 1\], got 8: for 8 of 255 give --eps 8/255"),
        (["--eps=-0.1"], "--eps"),
        (["--step-size", "2"], r"--step-size is in units of \[0, 1\]"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["-n", "0"], "--samples must be 1 or more"),
        (["--batch-size", "0"], "--batch-size must be 1 or more"),
        (["--queries", "0"], "--queries must be 1 or more"),
        (["--eot", "0"], "--eot must be 1 or more"),
        (["--check-samples=-1"], "--check-samples must be 0 or more"),
        (["--purify-steps", "3"], "--purify-steps needs --purify cos or diff"),
        (["--purify", "none", "--purify-step-size", "3"], "--purify-step-size needs --purify cos"),
    ],
)
def test_bad_settings(words: list[str], more: list[str], message: str) -> None:
    with pytest.raises(EdgeclipError, match=message):
        run(words, *more)


def test_larger_perturbations_of_l2_are_allowed(words: list[str]) -> None:
    found = run(words, "--norm", "l2", "--eps", "2", "--attack", "pgd")
    assert found["settings"]["eps"] == 2


def test_bad_subjects_and_data(words: list[str]) -> None:
    with pytest.raises(LabelError, match="template"):
        run(words, "--template", "no place")
    with pytest.raises(SettingsError, match="is a folder"):
        run(words, "--out", str(Path(words[-1]).parent))
    with pytest.raises(ModelError, match="unknown model"):
        run(["nothing-of-this-name", *words[1:]])
    with pytest.raises(DataError, match="unknown data set"):
        run(words, "--data", "mnist-of-mars")
    for option in ("--data", "--eps", "--out"):
        at = words.index(option)
        with pytest.raises(SettingsError, match=f"{option} is missing"):
            run(words[:at] + words[at + 2 :])
