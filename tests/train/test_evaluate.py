"""Evaluation under attack as a whole, on a tiny CLIP and a few images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgeclip import EdgeclipError, LabelError
from edgeclip.storage import sha256
from tests.support.data_sets import cifar10
from tests.support.evaluation import run
from tests.support.export_models import exported, write_folder
from tests.support.paths import ROOT
from train import evaluate
from train.data import dataset
from train.data.loader import Pictures, batches, draw
from train.errors import DataError, ModelError, SettingsError
from train.evaluate import build_parser
from train.models.checkpoints import load
from train.models.classifier import Classifier, class_embeddings
from train.models.weight_files import join_sha256
from train.robustness import result_file, subjects
from train.robustness.checks import CHECKS
from train.robustness.measurement import Measurement
from train.robustness.protocols import PROTOCOLS
from train.robustness.subjects import open_subject

SMALL = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 4}
MODES = ["exact", "identity", "encoder", "released"]


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "subject", "vit", **SMALL)


@pytest.fixture
def words(subject: Path, fashion_folder: Path, tmp_path: Path) -> list[str]:
    """Return a command without checks, which have their own tests."""
    line = f"{subject} --data fashion-mnist:{fashion_folder} --eps 4/255 --steps 3 -n 40"
    line += " --batch-size 16 --queries 20 --check-samples 0 --device cpu"
    return [*line.split(), "--out", str(tmp_path / "found.json")]


def without_times(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "seconds"}


def marks(found: dict[str, Any], *keys: str) -> np.ndarray:
    rows = [found["samples"][key] for key in keys or found["samples"]]
    return np.array([[mark == "1" for mark in row] for row in rows])


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


def test_killed_evaluation_goes_on(words: list[str]) -> None:
    """Kill a run between two writes; finished marks are not computed again."""
    attacks = ["--attack", "apgd-ce", "pgd", "--steps", "20", "--threads", "1"]
    out = Path(words[-1])
    child = subprocess.Popen(
        [sys.executable, "-m", "train.evaluate", *words, *attacks], stderr=subprocess.PIPE,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        if out.is_file() and 0 < json.loads(out.read_text()).get("finished", 0) < 40:
            break
        time.sleep(0.01)
    child.kill()
    assert child.stderr is not None
    child.stderr.close()
    child.wait()
    half = json.loads(out.read_text())
    assert 0 < half["finished"] < 40
    # What was found is kept, not computed again: a mark that no attack would leave stays.
    spoilt = half | {"samples": half["samples"] | {"clean": "0" + half["samples"]["clean"][1:]}}
    spoilt["samples"]["pgd/exact"] = "1" + half["samples"]["pgd/exact"][1:]
    out.write_text(json.dumps(spoilt))
    again = run(words, *attacks)
    out.unlink()
    whole = run(words, *attacks)
    for key in whole["samples"]:
        assert again["samples"][key][1:] == whole["samples"][key][1:]
    assert (again["samples"]["clean"][0], again["samples"]["pgd/exact"][0]) == ("0", "1")


def test_more_images_are_added_to_what_is_there(words: list[str]) -> None:
    some = run(words, "-n", "16")
    more = run(words)
    assert more["samples"]["clean"][:16] == some["samples"]["clean"]
    Path(words[-1]).unlink()
    assert without_times(run(words)) == without_times(more)
    with pytest.raises(SettingsError, match=r"other settings \(samples\)"):
        run(words, "-n", "16")


def test_last_part_of_a_batch_is_attacked_again_beside_others(words: list[str]) -> None:
    some = run(words, "-n", "24")  # 16 and 8
    spoilt = json.loads(json.dumps(some))
    spoilt["samples"] = dict.fromkeys(some["samples"], "1" * 24)
    Path(words[-1]).write_text(json.dumps(spoilt))
    more = run(words)
    Path(words[-1]).unlink()
    whole = run(words)
    for key in whole["samples"]:
        assert more["samples"][key] == "1" * 16 + whole["samples"][key][16:]


def test_square_alone_masks_nothing(words: list[str]) -> None:
    found = run(words, "--attack", "square", "--purify", "cos")
    assert [row["gradient"] for row in found["results"]] == ["exact"]
    assert found["masking"] is None


def test_other_model_of_another_size_is_refused(words: list[str], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", "vit")
    with pytest.raises(SettingsError, match="takes images of another size"):
        run(words, "--transfer-from", str(other))


def test_partial_figures_are_over_finished_images(words: list[str]) -> None:
    whole = run(words, "--attack", "pgd")
    half = json.loads(json.dumps(whole))
    half["samples"]["pgd/exact"] = whole["samples"]["pgd/exact"][:16] + "?" * 24
    work = Measurement(checked(words, "--attack", "pgd"), 0, 1, torch.device("cpu"))
    Path(words[-1]).write_text(json.dumps(half))
    work.resume()
    found = work.recorder.result().to_dict()
    assert found["finished"] == 16
    assert found["clean_accuracy"] == pytest.approx(marks(whole, "clean")[0, :16].mean())
    assert found["worst_case_accuracy"] == pytest.approx(marks(whole)[:, :16].all(0).mean())


def checked(words: list[str], *more: str) -> Any:
    args = build_parser().parse_args([*words, *more])
    evaluate.check(args)
    return args


def test_two_processes_equal_one(words: list[str]) -> None:
    attacks = ["--attack", "autoattack", "cw", "--purify", "cos", "--check-samples", "8"]
    one = run(words, *attacks)
    out = Path(words[-1])
    out.unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "train.evaluate", *words, *attacks, "--threads", "1"], check=True,
        capture_output=True, timeout=240, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert without_times(json.loads(out.read_text())) == without_times(one)
    assert list(out.parent.glob("found.json.*")) == []


def test_files_of_more_processes_are_taken_up(words: list[str]) -> None:
    whole = run(words, "--attack", "pgd")
    out = Path(words[-1])
    for rank, kept in enumerate((range(16), range(16, 32))):
        part = json.loads(json.dumps(whole))
        part["samples"] = {
            key: "".join(mark if i in kept else "?" for i, mark in enumerate(row))
            for key, row in whole["samples"].items()
        }
        part["seconds"] = dict.fromkeys(whole["samples"], 5.0)
        name = f"{out.name}.rank{rank}" if rank else out.name
        out.with_name(name).write_text(json.dumps(part))
    again = run(words, "--attack", "pgd")
    assert without_times(again) == without_times(whole)
    assert again["seconds"]["pgd/exact"] >= 10
    assert list(out.parent.glob("found.json.*")) == []


def test_ten_checks_are_run_and_kept(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*words, "--check-samples", "12", "--attack", "pgd", "--purify", "cos"]
    found = run(words)
    assert [row["name"] for row in found["checks"]] == list(CHECKS)
    assert len(CHECKS) == 10
    assert all(row["passed"] in (True, False, None) and row["figure"] for row in found["checks"])
    failed = [str(i) for i, row in enumerate(found["checks"], 1) if row["passed"] is False]
    shown = capsys.readouterr().out
    warning = f"DO NOT TRUST THESE FIGURES: checks {', '.join(failed)} FAILED"
    assert (warning in shown) == bool(failed)
    out = Path(words[words.index("--out") + 1])
    spoilt = found | {"checks": [found["checks"][0] | {"figure": "kept"}]}
    out.write_text(json.dumps(spoilt))
    again = run(words)["checks"]
    assert again[0]["figure"] == "kept"
    assert again[1:] == found["checks"][1:]


@pytest.fixture
def bundled(fashion_folder: Path, tmp_path: Path) -> list[str]:
    made = exported("vit")
    line = f"{made.bundle.path} --checkpoint {made.folder} --data fashion-mnist:{fashion_folder}"
    line += " --eps 4/255 --steps 2 -n 12 --attack pgd --check-samples 0"
    return [*line.split(), "--out", str(tmp_path / "found.json")]


def test_bundle_is_measured_as_the_runtime_runs_it(bundled: list[str]) -> None:
    found = run(bundled, "--purify", "cos", "--purify-step-size", "0.2", "--check-samples", "6")
    made = exported("vit")
    assert found["settings"]["templates"] == list(made.bundle.manifest.templates)
    assert found["settings"]["null_templates"] == list(made.bundle.manifest.null_templates)
    assert 0 <= found["agreement"] < 1e-5
    (precisions,) = (row for row in found["checks"] if row["name"] == "exported precisions")
    assert precisions["passed"] is True
    assert "fp32" in precisions["figure"]


def test_bundle_recommends_its_purification(bundled: list[str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundled[0], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["purification"] = {"steps": 3, "step_size": 0.1}
    (copy / "manifest.json").write_text(json.dumps(manifest))

    def purification(*more: str) -> Any:
        Path(bundled[-1]).unlink(missing_ok=True)
        return run([str(copy), *bundled[1:]], *more)["settings"]["purification"]

    assert purification() == {"steps": 3, "step_size": 0.1}
    assert purification("--purify", "none") is None
    assert purification("--purify", "cos") == {"steps": 10, "step_size": 30.0}  # as published


def test_bundle_whose_runtime_disagrees_is_refused(
    bundled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = subjects.BundleClassifier.probabilities
    monkeypatch.setattr(
        subjects.BundleClassifier,
        "probabilities",
        lambda self, images: wrong(self, images)[:, ::-1],
    )
    with pytest.raises(SettingsError, match="does not compute what its checkpoint computes"):
        run(bundled)
    assert "cw/exact" not in json.loads(Path(bundled[-1]).read_text())["samples"]


def test_bundle_needs_its_own_weights(bundled: list[str], subject: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="exported from other weights"):
        run([bundled[0], "--checkpoint", str(subject), *bundled[3:]])
    with pytest.raises(SettingsError, match="--checkpoint goes with a bundle"):
        run([str(subject), *bundled[1:]])
    alone = tmp_path / "alone" / "bundle"
    shutil.copytree(bundled[0], alone)
    with pytest.raises(SettingsError, match="are not beside it"):
        open_subject(str(alone))
    made = exported("vit")  # in the folder of its run, or beside it
    assert open_subject(str(made.bundle.path)).source.weights_sha256 == made.source.weights_sha256
    shutil.copytree(made.folder, alone.parent, dirs_exist_ok=True)
    assert open_subject(str(alone)).source.weights_sha256 == made.source.weights_sha256


def write_tower(folder: Path, path: Path) -> Path:
    """Write a file with only an image tower, like those of FARE."""
    state = load_file(folder / "open_clip_model.safetensors")
    tower = {k.removeprefix("visual."): v / 2 for k, v in state.items() if k.startswith("visual.")}
    torch.save(tower, path)
    return path


def test_an_image_tower_is_measured_over_the_models_weights(
    words: list[str], subject: Path, tmp_path: Path
) -> None:
    tower = write_tower(subject, tmp_path / "fare.pt")
    few = ["--attack", "pgd", "-n", "8"]
    plain = run(words, *few)
    with pytest.raises(SettingsError, match=r"other settings \(visual, weights_sha256\)"):
        run(words, *few, "--visual", str(tower))
    Path(words[-1]).unlink()
    found = run(words, *few, "--visual", str(tower))
    base = plain["settings"]["weights_sha256"]
    assert found["settings"]["weights_sha256"] == join_sha256([base, sha256(tower)])
    assert found["settings"]["visual"] == str(tower)
    assert result_file.read(Path(words[-1])).model == f"{subject} {tower}"
    with pytest.raises(SettingsError, match=r"other settings \(quick_gelu\)"):
        run(words, *few, "--visual", str(tower), "--quickgelu")


def test_a_bundle_with_an_image_tower_of_its_own_needs_its_file(tmp_path: Path) -> None:
    made, folder = exported("vit"), tmp_path / "bundle"
    tower = write_tower(made.folder, tmp_path / "fare.pt")
    source = load(str(made.folder), None, visual=str(tower))
    shutil.copytree(made.bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"source": source.record}))
    with pytest.raises(SettingsError, match=r"image tower fare\.pt: name its file with --visual"):
        open_subject(str(folder), checkpoint=str(made.folder))
    opened = open_subject(str(folder), checkpoint=str(made.folder), visual=str(tower))
    assert opened.source.weights_sha256 == source.weights_sha256
    half = opened.source.model.visual.proj
    assert torch.equal(2 * half, made.source.model.visual.proj)


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


def test_results_of_other_settings_are_not_mixed(words: list[str]) -> None:
    run(words, "--attack", "pgd")
    with pytest.raises(SettingsError, match=r"other settings \(eps, attack, step_size\)"):
        run(words, "--attack", "pgd", "cw", "--eps", "8/255")
    found = json.loads(Path(words[-1]).read_text())
    for text in ("{}", "[", json.dumps(found | {"samples": {"nothing": "1"}})):
        Path(words[-1]).write_text(text)
        with pytest.raises(
            SettingsError, match=r"is no result of python -m train\.evaluate: .*: remove the file"
        ):
            run(words, "--attack", "pgd")


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
