"""Priors in bundles: manifest entries, and files that were altered."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgeclip import BundleError, DiffPurifier, Runtime
from edgeclip.bundle import Bundle
from edgeclip.manifest import Manifest, PriorSpec
from export.graphs.prior import PRIOR_FILE
from tests.support.models.prior_models import with_prior

IMAGE = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return with_prior()


def changed(tiny: Any, **entries: Any) -> str:
    data = json.loads(tiny.bundle.manifest.to_json())
    return json.dumps(data | entries)


def test_manifest_tells_of_the_prior(tiny: Any) -> None:
    spec = tiny.bundle.manifest.prior
    assert spec.file == PRIOR_FILE
    assert spec.file in tiny.bundle.manifest.files
    assert (spec.timesteps, spec.gradient) == (1000, "exact")
    assert spec.weights_sha256 == tiny.prior.weights_sha256
    parity = spec.parity
    assert parity.keys() == {"loss_max_rel_diff", "gradient_max_rel_diff", "forward_min_cosine"}
    assert parity["loss_max_rel_diff"] < 1e-4
    assert parity["gradient_max_rel_diff"] < 1e-4
    assert parity["forward_min_cosine"] < 1
    tiny.bundle.verify()


def test_manifest_round_trip(tiny: Any) -> None:
    recommended = {
        "method": "diff", "steps": 3, "step_size": 0.5, "timesteps": [10, 99], "seed": 7,
    }  # fmt: skip
    manifest = Manifest.from_json(changed(tiny, purification=recommended))
    assert manifest.purification == DiffPurifier(3, 0.5, (10, 99), 7)
    assert manifest.prior == tiny.bundle.manifest.prior
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["purification"] == recommended
    assert isinstance(hash(manifest.purification), int)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"prior": None}, "needs a bundle with a diffusion prior"),
        ({"purification": {"timesteps": [900, 1000]}}, "prior has the timesteps 0 to 999"),
        ({"purification": {"timesteps": [10, 9]}}, "timesteps must be the first and the last"),
        ({"purification": {"seed": -1}}, "seed must be 0 to"),
        ({"purification": {"method": "other"}}, "unknown purification 'other'"),
        ({"purification": {"timesteps": 3}}, "manifest"),
        ({"prior": {"gradient": "else"}}, "gradient must be one of"),
        ({"prior": {"timesteps": 0}}, "timesteps must be a number"),
        ({"prior": {"file": 3}}, "must be texts"),
        ({"prior": {"file": "../prior.onnx"}}, "no sha256 for"),
        ({"prior": {"parity": {"a": "b"}}}, "parity must be numbers by name"),
        ({"prior": {"weights_sha256": None}}, "must be texts"),
    ],
)
def test_manifests_that_make_no_sense(
    tiny: Any, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    data = json.loads(tiny.bundle.manifest.to_json())
    data["purification"] = {"method": "diff", "steps": 3, "step_size": 0.5, "timesteps": [1, 2],
                            "seed": 0}  # fmt: skip
    for name, change in entries.items():
        data[name] = change and data[name] | change
    bundle = shutil.copytree(tiny.bundle.path, tmp_path / "bundle")
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message) as error:
        Bundle(bundle)
    assert "\n" not in str(error.value)


def test_prior_spec_needs_its_entries() -> None:
    with pytest.raises(ValueError, match="timesteps must be a number"):
        PriorSpec("prior.onnx", "0", True, "exact")
    assert PriorSpec("prior.onnx", "0", 10, "forward").parity == {}


@pytest.mark.parametrize("how", ["altered", "missing", "no graph"])
def test_spoiled_steps(tiny: Any, tmp_path: Path, how: str) -> None:
    folder = shutil.copytree(tiny.bundle.path, tmp_path / "bundle")
    path = folder / PRIOR_FILE
    if how == "missing":
        path.unlink()
        with pytest.raises(BundleError, match=r"prior\.onnx is missing"):
            Bundle(folder)
        return
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    if how == "no graph":
        data = json.loads((folder / "manifest.json").read_text())
        path.write_bytes(b"nothing")
        data["files"][PRIOR_FILE] = hashlib.sha256(b"nothing").hexdigest()
        (folder / "manifest.json").write_text(json.dumps(data))
    Runtime(folder, purify="none", device="cpu")  # does not open it
    message = "was altered" if how == "altered" else "is not an ONNX file"
    with pytest.raises(BundleError, match=message) as error:
        Runtime(folder, purify="diff", device="cpu").embed_images([IMAGE])
    assert PRIOR_FILE in str(error.value)


def test_another_graph_in_its_place_is_refused(tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.bundle.path, tmp_path / "bundle")
    data = json.loads((folder / "manifest.json").read_text())
    other = next(folder.glob("image_encoder*.onnx"))
    onnx.save(onnx.load(other), folder / PRIOR_FILE)  # with its weights
    data["files"][PRIOR_FILE] = hashlib.sha256((folder / PRIOR_FILE).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="which contradicts the manifest"):
        Runtime(folder, purify="diff", device="cpu").embed_images([IMAGE])
