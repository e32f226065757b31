"""Embedded bundles: names, default, content, and the size of the package that contains them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeclip import Bundle, Runtime
from edgeclip.bundle import DEFAULT, EMBEDDED, MANIFEST
from edgeclip.tools import bench, golden
from tests.support.commands import run
from tests.support.paths import EXAMPLES, GARMENTS, ROOT

BAG = str(EXAMPLES / "bag.png")
PACKAGE_SIZE = 45_000_000  # bytes; a wheel compresses its files and is smaller


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_bundle_is_whole_and_has_no_other_files(name: str) -> None:
    bundle = Bundle(name)
    bundle.verify()
    assert {path.name for path in EMBEDDED[name].iterdir()} == {MANIFEST, *bundle.manifest.files}


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_bundle_works_and_only_the_demonstration_has_a_note(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    golden.check(Runtime(name, device="cpu", purify="none"))
    labels = ["--label", "a bag", "--label", "a dog"]
    status, out, err = run(capsys, "classify", BAG, *labels, "--bundle", name)
    assert (status, len(json.loads(out)["predictions"])) == (0, 2)
    assert ("demonstration" in err) == (name == "garments")


def test_the_default_is_an_embedded_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert Bundle().path == Bundle(DEFAULT).path == EMBEDDED[DEFAULT]
    assert json.loads(run(capsys, "info")[1])["bundle"] == str(EMBEDDED[DEFAULT])
    predictions = Runtime(purify="none").classify(BAG, ["a bag", "a dog"])
    assert sum(prediction.score for prediction in predictions) == pytest.approx(1, abs=1e-6)


def test_the_folder_of_earlier_versions_is_the_bundle_garments() -> None:
    assert GARMENTS == EMBEDDED["garments"] == ROOT / "edgeclip/bundles/fashion"


def test_a_name_is_an_embedded_bundle_and_a_path_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GARMENTS, "garments")
    manifest = json.loads(Path("garments", MANIFEST).read_text())
    del manifest["precisions"]["int8"]
    Path("garments", MANIFEST).write_text(json.dumps(manifest))
    assert Bundle("garments").path == GARMENTS
    for path in ("./garments", "garments/", tmp_path / "garments", Path("garments")):
        bundle = Bundle(path)
        assert list(bundle.manifest.precisions) == ["fp32"]
        assert bench.find_targets(bundle.path, "cpu", ()) == [("cpu", "fp32")]


def test_the_commands_list_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "info", "garments")[1])["embedded_bundles"] == list(EMBEDDED)
    names = ", ".join(EMBEDDED)
    for command in ("classify", "embed", "explain", "info", "doctor", "build", "bench"):
        text = " ".join(run(capsys, command, "--help")[1].split())
        assert f"an embedded bundle's name: {names} (default: {DEFAULT})" in text
    status, out, err = run(capsys, "info", "garmnets")
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: garmnets is not a bundle")
    assert f"name an embedded bundle ({names})" in line


def test_the_package_is_small() -> None:
    files = [path for path in (ROOT / "edgeclip").rglob("*") if path.is_file()]
    sizes = {path: path.stat().st_size for path in files if "__pycache__" not in path.parts}
    assert any(GARMENTS in path.parents for path in sizes)
    assert sum(sizes.values()) <= PACKAGE_SIZE
