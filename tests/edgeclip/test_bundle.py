"""Bundles: what is refused, and that nothing altered is ever run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

import edgeclip
from edgeclip import Bundle, BundleError
from edgeclip.storage import sha256
from edgeclip.tools import golden
from edgeclip.tools.doctor import describe
from tests.support.paths import GARMENTS


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the bundle garments, for a test to modify."""
    return Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict], object]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_unknown_entries_are_ignored(copy: Path) -> None:
    edit(copy, lambda data: data.update(later_idea=1))
    assert Bundle(copy).manifest == Bundle("garments").manifest


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("int8", 0.05)])
def test_golden_outputs_hold(precision: str, limit: float) -> None:
    found = golden.check(edgeclip.Runtime("garments", precision=precision))
    assert found["pixels"] <= 1e-3
    assert found["image"] < limit
    assert found["text"] < limit


@pytest.mark.parametrize(("cosine", "good"), [(0.9999, True), (0.98, False), (0.5, False)])
def test_golden_check_is_by_the_distance_of_embeddings(
    copy: Path, cosine: float, good: bool
) -> None:
    """However many dimensions share it: each component may be small."""
    with np.load(copy / "golden.npz") as arrays:
        golden_arrays = dict(arrays)
    own = golden_arrays["embedding"]
    other = np.random.default_rng(0).standard_normal(own.shape)
    other -= own * (own @ other)
    other /= np.linalg.norm(other)
    moved = cosine * own + np.sqrt(1 - cosine**2) * other
    np.savez(copy / "golden.npz", **golden_arrays | {"embedding": moved.astype(np.float32)})
    Bundle.write_manifest(copy, Bundle(copy).manifest)
    runtime = edgeclip.Runtime(copy, precision="int8")
    if good:
        assert golden.check(runtime)["image"] > 0.01
    else:
        with pytest.raises(BundleError, match="golden image differ"):
            golden.check(runtime)


@pytest.mark.parametrize("kind", ["image_encoder", "image_tokens", "text_encoder"])
@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/hostname", "other.bin", "", "manifest.json"]
)
def test_weights_are_in_the_bundle_under_their_graphs_name(
    copy: Path, kind: str, name: str
) -> None:
    path = copy / f"{kind}.int8.onnx"
    model = onnx.load(path)
    large = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    large.data_location = onnx.TensorProto.EXTERNAL
    large.external_data.add(key="location", value=name)
    (copy / "other.bin").write_bytes(large.raw_data)
    large.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    Bundle.write_manifest(copy, Bundle(copy).manifest)
    with pytest.raises(BundleError, match=rf"{kind}\.int8\.onnx has weights in"):
        Bundle(copy).encoder(kind, "int8")


def test_the_token_graph_has_its_weights_in_the_encoders_file_only(copy: Path) -> None:
    """Check that FILE.data of the token graph is refused: no hash of the encoder covers it."""
    path = copy / "image_tokens.int8.onnx"
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data")
    Bundle.write_manifest(copy, Bundle(copy).manifest)
    with pytest.raises(BundleError, match=r"a bundle has them in image_encoder\.int8\.onnx\.data"):
        Bundle(copy).encoder("image_tokens", "int8")
    data = copy / "image_encoder.int8.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    shutil.copy(GARMENTS / path.name, path)
    edit(copy, lambda manifest: manifest["files"].update({path.name: sha256(path)}))
    with pytest.raises(BundleError, match=r"image_encoder\.int8\.onnx\.data was altered"):
        Bundle(copy).encoder("image_tokens", "int8")


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle.*python -m export"):
        Bundle(tmp_path / "none")
    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle(tmp_path)


@pytest.mark.parametrize("version", [3, 0, None, "1", 1.5, True])
def test_other_schema_versions(copy: Path, version: object) -> None:
    edit(copy, lambda data: data.update(schema_version=version))
    with pytest.raises(BundleError, match=f"schema version {version} is not supported"):
        Bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("embed_dim"), "entry 'embed_dim' is missing"),
        (lambda data: data["image"].pop("size"), "entry 'size' is missing"),
        (lambda data: data.update(precisions=[]), "malformed"),
        (lambda data: data.update(purification={"steps": -1, "step_size": 1}), "malformed"),
        (lambda data: data["files"].pop("tokenizer.json"), "no sha256 for tokenizer.json"),
        (lambda data: data["files"].update({"../x": "0"}), "plain file names, got '../x'"),
    ],
)
def test_broken_manifests(copy: Path, change: Callable[[dict], object], message: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle(copy)
    assert "manifest.json" in str(caught.value)


def put(*path: str, value: object) -> Callable[[dict], object]:
    """Return a function that changes one entry of the manifest."""

    def change(data: dict) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


MEASURED = {
    "data": "fashion-mnist", "samples": 500, "norm": "linf", "eps": 0.03, "attacks": ["apgd-ce"],
    "steps": 100, "restarts": 1, "seed": 0, "purification": "none", "clean_accuracy": 0.75,
    "worst_case_accuracy": 0.5,
}  # fmt: skip


def test_robustness_is_read_and_told(copy: Path) -> None:
    edit(copy, put("robustness", value=[MEASURED]))
    (row,) = Bundle(copy).manifest.robustness
    assert (row.attacks, row.worst_case_accuracy) == (("apgd-ce",), 0.5)
    (line,) = describe(Bundle(copy))["robustness"]
    assert line.startswith("fashion-mnist, 500 images: 75.0% clean, 50.0% under apgd-ce with linf")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("precisions", {}),
        ("precisions", {"fp4": {"image_encoder": "a", "text_encoder": "b"}}),
        ("files", None),
        ("files", 5),
        ("image.size", "28"),
        ("image.size", [28, 28, 28]),
        ("image.size", [28, -28]),
        ("image.size", [10**6, 10**6]),
        ("image.mean", None),
        ("image.std", [1, 0, 1]),
        ("image.resize", "foo"),
        ("image.fill", 300),
        ("embed_dim", "128"),
        ("logit_scale", "x"),
        ("logit_scale", float("nan")),
        ("logit_bias", None),
        ("purification", {"steps": 10**30, "step_size": 1.0}),
        ("text.context_length", 0),
        ("text.clean", "none"),
        ("templates", []),
        ("templates", "a {}"),
        ("templates", ["a photo"]),
        ("source", None),
        ("tokens.grid", 7),
        ("precisions.fp32.parity", {"a": "b"}),
        ("precisions.fp32.image_encoder", 3),
        ("precisions.fp32.image_tokens", 3),
        ("precisions.fp32.image_tokens", None),
        ("robustness", None),
        ("robustness", [{"data": "some"}]),
        ("robustness", [MEASURED | {"eps": "8/255"}]),
        ("robustness", [MEASURED | {"attacks": "apgd-ce"}]),
        ("robustness", [MEASURED | {"samples": 0.5}]),
    ],
)
def test_wrong_entries_of_the_manifest(copy: Path, entry: str, value: object) -> None:
    edit(copy, put(*entry.split("."), value=value))
    with pytest.raises(BundleError, match=r"manifest\.json: ") as caught:
        Bundle(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("entry", "value"), [("embed_dim", 64), ("image.size", [32, 32])])
def test_encoder_that_is_not_the_manifests(copy: Path, entry: str, value: object) -> None:
    edit(copy, put(*entry.split("."), value=value))
    with pytest.raises(BundleError, match="contradicts the manifest"):
        edgeclip.Runtime(copy)


def test_manifest_that_is_no_json(copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle(copy)
    (copy / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="cannot read manifest"):
        Bundle(copy)


@pytest.mark.parametrize("name", sorted(Bundle("garments").manifest.files))
def test_missing_and_altered_files_are_named(copy: Path, name: str) -> None:
    path = copy / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    bundle = Bundle(copy)
    with pytest.raises(BundleError, match=f"{name} was altered"):
        bundle.verify()
    with pytest.raises(BundleError, match=f"{name} was altered"):
        bundle.file(name)
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Bundle(copy)


def test_altered_encoder_is_never_run(copy: Path) -> None:
    path = copy / "image_encoder.int8.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"image_encoder\.int8\.onnx was altered"):
        edgeclip.Runtime(copy, precision="int8")


def test_null_text_of_the_wrong_kind(copy: Path) -> None:
    path = copy / "embeddings.safetensors"
    for arrays, message in (
        ({"other": np.zeros(128, np.float32)}, "holds no null_text"),
        ({"null_text": np.zeros(3, np.float32)}, "is not float32"),
    ):
        save_file(arrays, path)
        edit(copy, lambda data: data["files"].update({path.name: sha256(path)}))
        with pytest.raises(BundleError, match=message):
            _ = Bundle(copy).null_text


@pytest.mark.parametrize("damage", ["empty", "cut", "key", "shape"])
def test_damaged_golden_file(copy: Path, damage: str) -> None:
    path = copy / "golden.npz"
    arrays = dict(np.load(path))
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "key":
        del arrays["ids"]
        np.savez(path, **arrays)
    else:
        np.savez(path, **(arrays | {"embedding": arrays["embedding"][:1]}))
    edit(copy, lambda data: data["files"].update({path.name: sha256(path)}))
    with pytest.raises(BundleError, match=r"golden\.npz"):
        golden.check(edgeclip.Runtime(copy, purify="none"))


def test_golden_check_notices_another_model(copy: Path) -> None:
    arrays = dict(np.load(copy / "golden.npz"))
    for name, change, message in (
        ("embedding", arrays["embedding"][::-1], "golden image differ"),
        ("text_embeddings", -arrays["text_embeddings"], "golden text differ"),
        ("pixels", arrays["pixels"] + 0.05, "golden pixels differ"),
        ("ids", arrays["ids"] + 1, "token ids differ"),
    ):
        np.savez(copy / "golden.npz", **(arrays | {name: change}))
        edit(copy, lambda data: data["files"].update({"golden.npz": sha256(copy / "golden.npz")}))
        with pytest.raises(BundleError, match=message):
            golden.check(edgeclip.Runtime(copy, precision="fp32", purify="none"))
