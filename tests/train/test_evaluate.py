"""Evaluation under attack as a whole, on a tiny CLIP and a few images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeclip import EdgeclipError, LabelError
from tests.support.data.data_sets import cifar10
from tests.support.models.export_models import write_folder
from tests.support.robustness.evaluation import SMALL, command, marks, run
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
def arguments(subject: Path, fashion_folder: Path, tmp_path: Path) -> list[str]:
    return command(subject, fashion_folder, tmp_path / "result.json")


MODES = ["exact", "identity", "encoder", "released"]


def test_every_attack_has_its_row(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    attacks = ["autoattack", "apgd-ce", "apgd-t", "fab-t", "square", "pgd", "cw", "feature"]
    result = run(arguments, "--attack", *attacks)
    assert [row["attack"] for row in result["results"]] == attacks
    assert {(row["gradient"], row["norm"], row["eps"]) for row in result["results"]} == {
        ("exact", "linf", 4 / 255)
    }
    robust = [row["robust_accuracy"] for row in result["results"]]
    assert all(accuracy <= result["clean_accuracy"] for accuracy in robust)
    assert result["worst_case_accuracy"] == pytest.approx(marks(result).all(0).mean())
    assert result["worst_case_accuracy"] <= min(robust)
    assert result["masking"] is None
    assert result["finished"] == result["settings"]["samples"] == 40
    stages = result["results"][0]["stages"]
    assert list(stages) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(stages.values()) == sorted(stages.values(), reverse=True)
    assert stages["square"] == result["results"][0]["robust_accuracy"]
    assert stages["apgd-ce"] == result["results"][1]["robust_accuracy"]
    assert set(result["seconds"]) == set(result["samples"])
    printed = capsys.readouterr().out
    assert f"{result['worst_case_accuracy']:.2%}" in printed
    assert "linf eps 4/255" in printed
    assert "NO CHECK WAS RUN" in printed


def test_every_gradient_has_its_rows(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(
        arguments, "--attack", "pgd", "square", "--purify", "cos", "--purify-step-size", "0.1"
    )
    rows = [(row["attack"], row["gradient"]) for row in result["results"]]
    assert rows == [("pgd", "exact"), ("square", "exact"), *(("pgd", mode) for mode in MODES[1:])]
    assert result["settings"]["purification"] == {"steps": 10, "step_size": 0.1}
    released = marks(result, "pgd/released").mean()
    others = [marks(result, "pgd/exact", "square/exact").all(0).mean()]
    others += [marks(result, f"pgd/{mode}").mean() for mode in ("identity", "encoder")]
    assert result["masking"] == pytest.approx(released - min(others))
    assert result["worst_case_accuracy"] == pytest.approx(marks(result).all(0).mean())
    printed = " ".join(capsys.readouterr().out.split())
    assert f"masking │ │ {100 * result['masking']:+.2f} points" in printed


def test_clean_accuracy_equals_a_plain_loop(arguments: list[str], subject: Path) -> None:
    result = run(arguments, "--attack", "pgd", "--template", "a {}", "--template", "the {}")
    source = load(str(subject), None)
    test_set = dataset.load(arguments[2], train=False)
    model = Classifier(source, class_embeddings(source, test_set.classes, ["a {}", "the {}"]))
    keys = draw(len(test_set), 40, seed=0)
    ((images, labels, _),) = batches(Pictures(test_set, source.model.visual), [keys], 0)
    with torch.no_grad():
        right = model.eval()(images).logits.argmax(1) == labels
    assert result["clean_accuracy"] == pytest.approx(right.float().mean().item())
    assert result["samples"]["clean"] == "".join(str(int(mark)) for mark in right)


def test_eps_0_changes_nothing(arguments: list[str]) -> None:
    result = run(arguments, "--eps", "0", "--attack", "apgd-ce", "pgd")
    assert result["worst_case_accuracy"] == result["clean_accuracy"]


def test_eps_near_1_fools_every_image(arguments: list[str]) -> None:
    result = run(arguments, "--eps", "0.9", "--steps", "20", "--attack", "apgd-ce")
    assert result["worst_case_accuracy"] <= 0.05


def test_square_alone_has_no_masking(arguments: list[str]) -> None:
    result = run(arguments, "--attack", "square", "--purify", "cos")
    assert [row["gradient"] for row in result["results"]] == ["exact"]
    assert result["masking"] is None


def test_other_model_of_another_size_is_refused(arguments: list[str], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", "vit")
    with pytest.raises(SettingsError, match="takes images of another size"):
        run(arguments, "--transfer-from", str(other))


def test_attacks_transfer_from_another_model(arguments: list[str], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", "vit", seed=2, **SMALL)
    result = run(
        arguments, "--check-samples", "8", "--transfer-from", str(other), "--attack", "pgd"
    )
    (row,) = (row for row in result["checks"] if row["name"] == "transfer is weaker")
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
    arguments = [str(subject), "--check-samples", "0", "--out", str(tmp_path / "out")]

    def follow(*more: str) -> None:
        evaluate.main(build_parser().parse_args([*arguments, *more]))

    with pytest.raises(SettingsError, match="1 of the 2 data sets of clipure-13 are missing"):
        follow("--protocol", "clipure-13")
    assert "no STL-10 in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    follow("--protocol", "clipure-13", "--skip-missing", "--steps", "1")
    names = ["cifar10-l2-0.5.json", "cifar10-linf-8.json"]
    results = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert sorted(results) == names
    settings = [results[name]["settings"] for name in names]
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
def test_bad_settings(arguments: list[str], more: list[str], message: str) -> None:
    with pytest.raises(EdgeclipError, match=message):
        run(arguments, *more)


def test_larger_perturbations_of_l2_are_allowed(arguments: list[str]) -> None:
    result = run(arguments, "--norm", "l2", "--eps", "2", "--attack", "pgd")
    assert result["settings"]["eps"] == 2


def test_bad_subjects_and_data(arguments: list[str]) -> None:
    with pytest.raises(LabelError, match="template"):
        run(arguments, "--template", "no place")
    with pytest.raises(SettingsError, match="is a folder"):
        run(arguments, "--out", str(Path(arguments[-1]).parent))
    with pytest.raises(ModelError, match="unknown model"):
        run(["nothing-of-this-name", *arguments[1:]])
    with pytest.raises(DataError, match="unknown data set"):
        run(arguments, "--data", "mnist-of-mars")
    for option in ("--data", "--eps", "--out"):
        at = arguments.index(option)
        with pytest.raises(SettingsError, match=f"{option} is missing"):
            run(arguments[:at] + arguments[at + 2 :])
