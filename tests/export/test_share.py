"""Bundles that share a text tower: equal answers, every file checked, and nothing outside the directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from edgeclip import Bundle, BundleError, Runtime
from edgeclip.bundle import MANIFEST, TOKENIZER
from edgeclip.storage import sha256
from edgeclip.tools import golden
from edgeclip.tools.doctor import describe
from export.share import main, share
from tests.support.paths import EXAMPLES, GARMENTS

BAG = EXAMPLES / "bag.png"
LABELS = ["bag", "dress", "coat"]
TEXT_FILES = {TOKENIZER, "text_encoder.fp32.onnx", "text_encoder.int8.onnx"}


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GARMENTS, tmp_path / "owner"))


@pytest.fixture
def bundle(tmp_path: Path, owner: Path) -> Path:
    """Return a bundle that shares the text tower of `owner`."""
    folder = Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))
    share(folder, owner)
    return folder


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_answers_and_properties_stay(bundle: Path, owner: Path) -> None:
    shared, whole = Bundle(bundle), Bundle(owner)
    assert whole.manifest.files == shared.manifest.files
    assert {path.name for path in owner.iterdir()} - {
        p.name for p in bundle.iterdir()
    } == TEXT_FILES
    assert {path.parent for path in shared.paths() if path.name in TEXT_FILES} == {owner.resolve()}
    assert describe(shared) == describe(whole) | {"bundle": str(bundle), "text_from": "owner"}
    for precision in ("fp32", "int8"):
        ours, theirs = (Runtime(b, precision=precision, labels=LABELS) for b in (shared, whole))
        assert ours.classify(BAG) == theirs.classify(BAG)
        assert ours.text_identity() == theirs.text_identity()  # one entry in the label cache
        golden.check(ours)


def test_an_embedded_text_tower_serves_a_bundle_anywhere(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GARMENTS, tmp_path / "far" / "bundle"))
    assert main([str(folder), "garments"]) == 0
    shared = Bundle(folder)
    assert shared.manifest.text_from == "garments"
    assert {p.parent for p in shared.paths() if p.name in TEXT_FILES} == {GARMENTS}
    runtime, whole = (Runtime(b, precision="fp32", labels=LABELS) for b in (shared, "garments"))
    assert runtime.classify(BAG) == whole.classify(BAG)
    golden.check(runtime)
    # A bundle of that name beside it comes first, and a damaged one is not passed over.
    (tmp_path / "far" / "garments").mkdir()
    with pytest.raises(BundleError, match=r"far/garments/.* is missing: .*copy both"):
        Bundle(folder)


def test_a_link_to_the_bundle_works_from_anywhere(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "link").symlink_to(bundle)
    Bundle(tmp_path / "far" / "link").verify()


def test_a_bundle_without_its_owner_is_refused(bundle: Path, owner: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(bundle, tmp_path / "elsewhere" / "bundle"))
    message = r"is missing: .* takes its text tower from the bundle owner beside it: copy both$"
    with pytest.raises(BundleError, match=message) as caught:
        Bundle(alone)
    assert str(alone.parent / "owner") in str(caught.value)
    (alone.parent / "owner").symlink_to(owner)
    with pytest.raises(BundleError, match=r"owner is a link: .* copy both$"):
        Bundle(alone)


@pytest.mark.parametrize("name", sorted(TEXT_FILES))
def test_an_altered_file_of_the_owner_is_refused(bundle: Path, owner: Path, name: str) -> None:
    (owner / name).write_bytes((owner / name).read_bytes() + b" ")
    with pytest.raises(BundleError, match=f"owner/{name} was altered"):
        Bundle(bundle).verify()
    with pytest.raises(BundleError, match=f"owner/{name} was altered"):
        Bundle(bundle).file(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../owner", "/etc", "owner/", "a/../owner", 3, []])
def test_only_a_name_in_the_same_directory_is_accepted(bundle: Path, name: object) -> None:
    edit(bundle, lambda manifest: manifest.update(text_from=name))
    with pytest.raises(BundleError, match="text_from must be the name of a bundle beside this one"):
        Bundle(bundle)


def test_weights_lie_in_the_directory_of_their_graph(bundle: Path, owner: Path) -> None:
    """Check that no graph of the owner is run with weights beside it that no hash of ours covers."""
    name = "text_encoder.tokens.onnx"
    shutil.copy(owner / "image_tokens.int8.onnx", owner / name)

    def use_graph(manifest: dict) -> None:
        manifest["precisions"]["int8"]["image_tokens"] = name
        manifest["files"][name] = sha256(owner / name)

    edit(bundle, use_graph)
    with pytest.raises(
        BundleError, match=rf"{name} has weights in image_encoder\.int8\.onnx\.data"
    ):
        Bundle(bundle).encoder("image_tokens", "int8")


def test_external_weights_are_shared_too(tmp_path: Path) -> None:
    """Share a text encoder whose weights are in a file of their own, as those above 16 MB are."""
    owner = Path(shutil.copytree(GARMENTS, tmp_path / "owner"))
    graph, data = owner / "text_encoder.fp32.onnx", "text_encoder.fp32.onnx.data"
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location=data)
    Bundle.write_manifest(owner, Bundle(owner).manifest)
    folder = Path(shutil.copytree(owner, tmp_path / "bundle"))
    share(folder, owner)
    assert not (folder / data).exists()
    golden.check(Runtime(folder, precision="fp32"))
    (owner / data).write_bytes((owner / data).read_bytes() + b"\0")
    with pytest.raises(BundleError, match=f"owner/{data} was altered"):
        Bundle(folder).encoder("text_encoder", "fp32")


def test_the_command(tmp_path: Path, owner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))
    assert main([str(folder), str(owner)]) == 0
    saved = sum((GARMENTS / name).stat().st_size for name in TEXT_FILES)
    expected = f"{folder} uses the text tower of {owner}: {saved / 1e6:.1f} MB saved\n"
    assert capsys.readouterr().out == expected


def test_bundles_that_cannot_share_stay_as_they_are(
    bundle: Path, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Path(shutil.copytree(owner, tmp_path / "whole"))
    other = Path(shutil.copytree(owner, tmp_path / "other"))
    (other / TOKENIZER).write_text((other / TOKENIZER).read_text() + "\n")
    Bundle.write_manifest(other, Bundle(other).manifest)
    far = Path(shutil.copytree(owner, tmp_path / "far" / "owner"))
    for arguments, message in (
        ((whole, other), "other does not have the same tokenizer.json: export both again"),
        ((whole, far), "are not two bundles in one directory"),
        ((whole, whole), "are not two bundles in one directory"),
        ((whole, bundle), "bundle has no text tower of its own"),
        ((bundle, whole), "bundle has no text tower of its own"),
        ((whole, tmp_path / "none"), "none is not a bundle"),
    ):
        assert main(list(map(str, arguments))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert {path.name for path in whole.iterdir()} == {path.name for path in GARMENTS.iterdir()}
