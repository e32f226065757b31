"""Evaluations of bundles, and of image towers with their own weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgeclip.storage import sha256
from tests.support.models.export_models import exported, write_folder
from tests.support.robustness.evaluation import SMALL, command, run
from train.errors import SettingsError
from train.models.checkpoints import load
from train.models.weight_files import join_sha256
from train.robustness import result_file, subjects
from train.robustness.subjects import open_subject


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "subject", "vit", **SMALL)


@pytest.fixture
def arguments(subject: Path, fashion_folder: Path, tmp_path: Path) -> list[str]:
    return command(subject, fashion_folder, tmp_path / "result.json")


@pytest.fixture
def bundled(fashion_folder: Path, tmp_path: Path) -> list[str]:
    export = exported("vit")
    line = (
        f"{export.bundle.path} --checkpoint {export.folder} --data fashion-mnist:{fashion_folder}"
    )
    line += " --eps 4/255 --steps 2 -n 12 --attack pgd --check-samples 0"
    return [*line.split(), "--out", str(tmp_path / "result.json")]


def test_bundle_is_measured_as_the_runtime_runs_it(bundled: list[str]) -> None:
    result = run(bundled, "--purify", "cos", "--purify-step-size", "0.2", "--check-samples", "6")
    export = exported("vit")
    assert result["settings"]["templates"] == list(export.bundle.manifest.templates)
    assert result["settings"]["null_templates"] == list(export.bundle.manifest.null_templates)
    assert 0 <= result["agreement"] < 1e-5
    (precisions,) = (row for row in result["checks"] if row["name"] == "exported precisions")
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


def test_bundle_alone_is_attacked_by_its_own_graph_as_its_checkpoint(
    bundled: list[str], tmp_path: Path
) -> None:
    alone = tmp_path / "alone" / "bundle"
    shutil.copytree(bundled[0], alone)
    with_checkpoint = run(bundled)
    Path(bundled[-1]).unlink()
    own = run([str(alone), *bundled[3:]])
    assert own["settings"]["weights_sha256"] != with_checkpoint["settings"]["weights_sha256"]
    assert own["samples"] == with_checkpoint["samples"]
    assert own["agreement"] < 1e-5


def test_embedded_bundle_is_a_subject_by_its_name() -> None:
    opened = open_subject("everyday")
    assert opened.bundle is not None
    assert opened.source.pretrained == "the bundle's int8-weights"
    assert opened.templates == opened.bundle.manifest.templates


def test_bundle_without_a_float_graph_needs_its_checkpoint(
    bundled: list[str], tmp_path: Path
) -> None:
    alone = tmp_path / "alone" / "bundle"
    shutil.copytree(bundled[0], alone)
    manifest = json.loads((alone / "manifest.json").read_text())
    manifest["precisions"] = {"int8": manifest["precisions"].pop("fp32")}
    (alone / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SettingsError, match=r"no precision of fp32, int8-weights.*--checkpoint"):
        open_subject(str(alone))


def test_bundle_needs_its_weights(bundled: list[str], subject: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="exported from other weights"):
        run([bundled[0], "--checkpoint", str(subject), *bundled[3:]])
    with pytest.raises(SettingsError, match="--checkpoint goes with a bundle"):
        run([str(subject), *bundled[1:]])
    alone = tmp_path / "alone" / "bundle"
    shutil.copytree(bundled[0], alone)
    export = exported("vit")  # in the folder of its run, or beside it
    assert (
        open_subject(str(export.bundle.path)).source.weights_sha256 == export.source.weights_sha256
    )
    shutil.copytree(export.folder, alone.parent, dirs_exist_ok=True)
    assert open_subject(str(alone)).source.weights_sha256 == export.source.weights_sha256


def write_tower(folder: Path, path: Path) -> Path:
    """Write a file with only an image tower, like those of FARE."""
    state = load_file(folder / "open_clip_model.safetensors")
    tower = {k.removeprefix("visual."): v / 2 for k, v in state.items() if k.startswith("visual.")}
    torch.save(tower, path)
    return path


def test_an_image_tower_is_measured_over_the_models_weights(
    arguments: list[str], subject: Path, tmp_path: Path
) -> None:
    tower = write_tower(subject, tmp_path / "fare.pt")
    few = ["--attack", "pgd", "-n", "8"]
    base_result = run(arguments, *few)
    with pytest.raises(SettingsError, match=r"other settings \(visual, weights_sha256\)"):
        run(arguments, *few, "--visual", str(tower))
    Path(arguments[-1]).unlink()
    result = run(arguments, *few, "--visual", str(tower))
    base = base_result["settings"]["weights_sha256"]
    assert result["settings"]["weights_sha256"] == join_sha256([base, sha256(tower)])
    assert result["settings"]["visual"] == str(tower)
    assert result_file.read(Path(arguments[-1])).model == f"{subject} {tower}"
    with pytest.raises(SettingsError, match=r"other settings \(quick_gelu\)"):
        run(arguments, *few, "--visual", str(tower), "--quickgelu")


def test_a_bundle_with_another_image_tower_needs_its_file(tmp_path: Path) -> None:
    export, folder = exported("vit"), tmp_path / "bundle"
    tower = write_tower(export.folder, tmp_path / "fare.pt")
    source = load(str(export.folder), None, visual=str(tower))
    shutil.copytree(export.bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"source": source.record}))
    with pytest.raises(SettingsError, match=r"image tower fare\.pt: name its file with --visual"):
        open_subject(str(folder), checkpoint=str(export.folder))
    opened = open_subject(str(folder), checkpoint=str(export.folder), visual=str(tower))
    assert opened.source.weights_sha256 == source.weights_sha256
    half = opened.source.model.visual.proj
    assert torch.equal(2 * half, export.source.model.visual.proj)
