"""Output, exit status and errors of the commands; every error is one clear line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from edgeclip import Runtime
from edgeclip.progress import text_progress
from tests.support.commands import BUNDLE, errors, run
from tests.support.paths import EXAMPLES, GARMENTS

BAG = str(EXAMPLES / "bag.png")
LABELS = [*BUNDLE, "--labels", str(EXAMPLES / "labels.txt")]


def test_json_lines_when_piped(capsys: pytest.CaptureFixture[str], labels: list[str]) -> None:
    status, out, err = run(capsys, "classify", BAG, str(EXAMPLES / "dress.png"), *LABELS)
    assert status == 0
    assert errors(err) == []
    first, second = map(json.loads, out.splitlines())
    assert first["image"] == BAG
    assert [sorted(p) for p in first["predictions"]] == [["index", "label", "score"]] * 5
    assert first["predictions"][0]["label"] == "bag"
    assert second["predictions"][0]["index"] == labels.index("dress")
    scores = [p["score"] for p in first["predictions"]]
    assert scores == sorted(scores, reverse=True)


def test_other_formats(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["classify", BAG, "missing.png", *LABELS, "--top-k", "2", "--format"]
    status, out, _ = run(capsys, *arguments, "json")
    assert status == 1
    answer, failed = json.loads(out)
    assert answer["predictions"][0]["label"] == "bag"
    assert failed == {"image": "missing.png", "error": "missing.png: no such file"}

    _, out, _ = run(capsys, *arguments, "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["image"], row["rank"]) for row in rows] == [
        (BAG, "1"),
        (BAG, "2"),
        ("missing.png", ""),
    ]
    assert rows[2]["error"] == "missing.png: no such file"

    _, out, err = run(capsys, *arguments, "table")
    lines = out.splitlines()
    assert lines[0] == BAG
    assert re.fullmatch(r" +\d+\.\d\d%  bag", lines[1])
    assert len(lines) == 3
    assert errors(err) == ["error: missing.png: no such file"]


def test_labels_on_the_command_line_and_templates(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["classify", BAG, *BUNDLE, "--label", "handbag", "--label", "ankle boot"]
    status, out, _ = run(capsys, *arguments, "--template", "my {}", "--template", "a {}.")
    assert status == 0
    assert json.loads(out)["predictions"][0]["label"] == "handbag"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["classify"], "required: IMAGE"),
        (["classify", BAG], "no labels: add --labels FILE"),
        (["classify", BAG, "--labels", "none.txt"], "none.txt: No such file"),
        (["classify", BAG, "--labels", os.devnull], "no labels in this file"),
        (["classify", BAG, "--label", "a", "--label", "a"], "'a' is there twice"),
        (["classify", BAG, *LABELS, "--template", "a photo"], "has no {}"),
        (["classify", BAG, *LABELS, "--top-k", "0"], "expected a whole number from 1, got '0'"),
        (["classify", BAG, *LABELS, "--purify", "cos", "--step-size", "nan"], "a number from 0"),
        (["classify", BAG, *LABELS, "--steps", "3"], "--steps needs --purify cos or diff"),
        (["classify", BAG, *LABELS, "--purify", "diff"], "needs a bundle with a diffusion prior"),
        (
            ["classify", BAG, *LABELS, "--device", "tensorrt"],
            "'tensorrt' needs edgeclip's CUDA kernels",
        ),
        (["classify", BAG, *LABELS, "--precision", "fp16"], "has no fp16 encoders"),
        (["classify", BAG, *LABELS, "--bundle", "none"], "none is not a bundle"),
        (["classify", BAG, *LABELS, "--frmat", "json"], "unrecognized arguments: --frmat"),
        (["classify", BAG, "--labels", ""], "No such file"),
        (["classify", BAG, *LABELS, "--top-k", "9" * 23], "a whole number from 1"),
        (["classify", BAG, *LABELS, "--threads", "5000"], "a whole number up to 1024"),
        (["classify", BAG, *LABELS, "--batch-size", "100000000"], "a whole number up to 4096"),
        (["classify", BAG, *LABELS, "--purify", "cos", "--steps", "10001"], "up to 10000"),
        (["classify", BAG, *BUNDLE, "--label", "caf\udce9"], "is not valid text"),
        (["classify", BAG, *LABELS, "--template", "x" * 5000], "has no {}"),
        (["embed"], "either images or --text"),
        (["embed", BAG, "--text", "x"], "either images or --text"),
        (["embed", BAG, *BUNDLE, "-o", "/nowhere/x.npz"], "/nowhere/x.npz: No such file"),
        (["embed", BAG, *BUNDLE, "-o", ""], "error: "),
        (["explain"], "required: IMAGE, --label, -o/--output"),
        (["explain", BAG, "--label", "x"], "required: -o/--output"),
        (["explain", BAG, "--label", "x", "-o", "x"], "cannot write images of the kind ''"),
        (["explain", BAG, "--label", "x", "-o", "x.psd"], "the kind '.psd'; try .png"),
        (
            ["explain", BAG, *BUNDLE, "--label", "x", "-o", "/nowhere/x.png"],
            "/nowhere/x.png: No such file",
        ),
        (
            ["explain", BAG, *BUNDLE, "--label", "", "-o", "/tmp/x.png"],
            "a label, or one of its prompts",
        ),
        (["explain", BAG, "--label", "x", "--label", "y", "-o", "x.png"], "takes one --label"),
        (["explain", BAG, "--label", "x", "--template", "y", "-o", "x.png"], "has no {}"),
        (["explain", BAG, BAG, BAG, "--label", "x", "-o", "x.png"], "unrecognized arguments"),
        (["explain", BAG, "--label", "x", "-o", "x.png", "--purify", "cos"], "unrecognized arg"),
        (["info", "none"], "none is not a bundle"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    (line,) = errors(err)
    assert line.startswith("error: ")
    assert message in line


def test_spoiled_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    encoder = bundle / "image_encoder.int8.onnx"

    def refused(message: str) -> None:
        classify = ["classify", BAG, *LABELS, "--precision", "int8", "--bundle"]
        for command in (classify, ["doctor"]):
            status, _, err = run(capsys, *command, str(bundle))
            assert status == 2
            (line,) = errors(err)
            assert message in line

    manifest.write_text(text.replace('"schema_version": 2', '"schema_version": 99'))
    refused("schema version 99 is not supported")
    manifest.write_text(text)
    encoder.write_bytes(encoder.read_bytes()[:-1])
    refused("image_encoder.int8.onnx was altered")
    encoder.unlink()
    refused("image_encoder.int8.onnx is missing")


def test_10_000_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"thing {i}\n" for i in range(9_999)) + "bag\n")
    arguments = ["classify", BAG, *BUNDLE, "--labels", str(path), "--template", "{}"]
    status, out, _ = run(capsys, *arguments, "--top-k", "10000")
    assert status == 0
    predictions = json.loads(out)["predictions"]
    assert len(predictions) == 10_000
    assert sum(p["score"] for p in predictions) == pytest.approx(1, abs=1e-3)


def test_one_label(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "classify", BAG, *BUNDLE, "--label", "anything")
    assert status == 0
    assert json.loads(out)["predictions"] == [{"label": "anything", "score": 1.0, "index": 0}]
    note = "note: a single label always scores 100 %; add others to compare it with"
    assert [line.startswith(note) for line in err.splitlines()].count(True) == 1
    two = run(capsys, "classify", BAG, *BUNDLE, "--label", "anything", "--label", "else")
    assert note not in two[2]


def test_a_note_names_the_demonstration_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(GARMENTS, tmp_path / "copy")
    picture = str(tmp_path / "out.png")
    for command in (
        ["classify", BAG, *LABELS],
        ["embed", BAG, *BUNDLE],
        ["explain", BAG, *BUNDLE, "--label", "bag", "-o", picture],
    ):
        status, out, err = run(capsys, *command, "--precision", "fp32")
        assert status == 0
        assert err.count("note: this is the embedded demonstration bundle (ten kinds") == 1
        assert "demonstration bundle" not in out
        status, _, err = run(capsys, *command, "--precision", "fp32", "--bundle", str(copy))
        assert (status, err) == (0, "")


def test_nothing_is_said_of_one_label_in_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert Runtime("garments", labels=["anything"]).classify(BAG)[0].score == 1
    assert "one label" not in "".join(capfd.readouterr())


def test_purification_options(capsys: pytest.CaptureFixture[str]) -> None:
    def score(*options: str) -> float:
        status, out, _ = run(capsys, "classify", BAG, *LABELS, *options)
        assert status == 0
        return json.loads(out)["predictions"][0]["score"]

    plain = score("--purify", "none")
    assert score() == plain  # this bundle recommends none
    assert score("--purify", "cos", "--steps", "9999", "--step-size", "0.001") != plain
    moved = score("--purify", "cos", "--steps", "1", "--step-size", "0.2")
    assert abs(moved - plain) > 1e-6


def test_embed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.npz"
    status, _, _ = run(capsys, "embed", BAG, "missing.png", *BUNDLE, "-o", str(path))
    assert status == 1
    with np.load(path) as arrays:
        assert arrays["images"].tolist() == [BAG]
        assert arrays["embeddings"].shape == (1, 128)
        assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
        np.testing.assert_allclose(np.linalg.norm(arrays["embeddings"], axis=1), 1, atol=1e-6)
        expected = arrays["embeddings"][0]
    _, out, _ = run(capsys, "embed", BAG, *BUNDLE)
    np.testing.assert_allclose(json.loads(out)["embedding"], expected, atol=1e-6)
    _, out, _ = run(capsys, "embed", *BUNDLE, "--text", "a coat", "--text", "ein Mantel")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a coat", "ein Mantel"]


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.PNG"
    arguments = [
        "explain",
        BAG,
        *BUNDLE,
        "--label",
        " bag ",
        "--template",
        "my {}",
        "-o",
        str(path),
    ]
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert errors(err) == []
    report = json.loads(out)
    assert list(report) == ["label", "images", "similarities", "output"]
    assert (report["label"], report["images"], report["output"]) == ("bag", [BAG], str(path))
    assert 0.2 < report["similarities"][0] <= 1
    assert [p.name for p in tmp_path.iterdir()] == ["out.PNG"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 320


def test_explain_a_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pair.jpg"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(BAG).read_bytes())))
    arguments = [*BUNDLE, "--label", "bag", "-o", str(path)]
    status, out, _ = run(capsys, "explain", BAG, "-", *arguments)
    assert status == 0
    report = json.loads(out)
    assert report["images"] == [BAG, "-"]
    assert report["similarities"][0] == report["similarities"][1]
    assert report["map_distance"] == 0
    other = str(EXAMPLES / "coloured-dress.jpg")
    status, out, _ = run(capsys, "explain", BAG, other, *arguments, "--format", "table")
    assert status == 0
    assert re.search(r"^map distance +[1-9]", out, re.MULTILINE)
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert picture.width > 4 * 320


def test_explain_leaves_what_was_there_where_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.png"
    path.write_text("before")
    bundle = Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"tokens": None}))
    for arguments, message in (
        ([BAG, "missing.png"], "missing.png: no such file"),
        ([str(EXAMPLES)], f"{EXAMPLES}: no images in this directory"),
        ([BAG, "--bundle", str(bundle)], "export a ViT, or a convolutional model from timm"),
    ):
        status, out, err = run(
            capsys, "explain", *BUNDLE, *arguments, "--label", "bag", "-o", str(path)
        )
        assert status == 2
        assert out == ""
        (line,) = errors(err)
        assert line.endswith(message)
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out.png"]


@pytest.mark.parametrize(
    "command", ["classify", "embed", "explain", "cache", "info", "doctor", "build", "bench"]
)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"edgeclip {command}" in out.partition("examples:")[2]


def test_whole_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgeclip", "classify", BAG, "missing.png", *LABELS]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 1
    note, error = found.stderr.splitlines()
    assert note.startswith("note: this is the embedded demonstration bundle")
    assert "Fashion-MNIST" in note
    assert "python -m export" in note
    assert error == "error: missing.png: no such file"
    assert json.loads(found.stdout.splitlines()[0])["predictions"][0]["label"] == "bag"


def test_cached_labels_load_nothing_of_the_text_side(capsys: pytest.CaptureFixture[str]) -> None:
    # Not auto: by trials of its own, the other process might choose another text encoder.
    arguments = ["classify", BAG, *LABELS, "--precision", "fp32"]
    assert run(capsys, *arguments)[0] == 0
    code = (
        "import sys; from edgeclip.cli.main import main;"
        f"status = main({arguments!r});"
        "slow = {'tokenizers', 'ftfy', 'tqdm', 'importlib.metadata', 'huggingface_hub'};"
        "sys.exit(status or sorted(slow & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_progress_of_labels_where_a_person_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_progress() is None
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    at_once = {"delay": 0, "mininterval": 0}  # else a bar that is gone soon is not shown
    monkeypatch.setattr("tqdm.tqdm", lambda **options: tqdm(**options | at_once))
    update = text_progress()
    assert update is not None
    assert terminal.getvalue() == ""
    update(1, 2)
    update(2, 2)
    assert "encoding labels: 100%" in terminal.getvalue()


def test_user_without_a_home() -> None:
    code = (
        "import os, pathlib, sys\n"
        "def home(*_): raise RuntimeError('no home')\n"
        "pathlib.Path.home = home\n"
        "from edgeclip.cli.main import main\n"
        f"sys.exit(main(['classify', {BAG!r}, '--label', 'bag']))"
    )
    hidden = ("EDGECLIP_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert found.returncode == 0
    assert "no home directory; set EDGECLIP_CACHE" in found.stderr


def test_missing_onnxruntime_is_explained() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from edgeclip.cli.main import main;"
        f"sys.exit(main(['classify', {BAG!r}, '--label', 'bag']))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "pip install 'edgeclip[cpu]'" in found.stderr
    assert "Traceback" not in found.stderr
