"""The command line: what it prints, its exit status, and one clear line for every failure."""

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
from conftest import EXAMPLES
from PIL import Image

from edgeclip.bundle import EMBEDDED
from edgeclip.cli import main

BAG = str(EXAMPLES / "bag.png")
LABELS = ["--labels", str(EXAMPLES / "labels.txt")]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command in this process."""
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def errors(stderr: str) -> list[str]:
    """The lines of stderr that are not the note about the embedded bundle."""
    return [line for line in stderr.splitlines() if not line.startswith("note: ")]


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
    arguments = ["classify", BAG, "--label", "handbag", "--label", "ankle boot"]
    status, out, _ = run(capsys, *arguments, "--template", "my {}", "--template", "a {}.")
    assert status == 0
    assert json.loads(out)["predictions"][0]["label"] == "handbag"


def test_directories_globs_and_stdin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    shutil.copy(BAG, tmp_path / "a.png")
    shutil.copy(BAG, tmp_path / "deep" / "b.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(BAG).read_bytes())))
    status, out, _ = run(capsys, "classify", str(tmp_path), f"{tmp_path}/*.png", "-", *LABELS)
    assert status == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [Path(answer["image"]).name for answer in answers] == ["a.png", "b.png", "a.png", "-"]
    assert len({answer["predictions"][0]["score"] for answer in answers}) == 1


def awkward_images(folder: Path) -> dict[str, str]:
    """Files that a careless decoder dies of, each with its error, "" where it has none."""
    jpeg = (EXAMPLES / "coloured-dress.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture\n")
    Image.new("RGB", (1, 1), "red").save(folder / "1x1.png")
    Image.new("RGB", (20000, 1), "red").save(folder / "20000x1.png")
    Image.new("RGB", (1, 20000), "red").save(folder / "1x20000.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return {
        "1x1.png": "",
        "1x20000.png": "",
        "20000x1.png": "",
        "animated.gif": "",
        "bomb.png": "more than 178,956,970 pixels",
        "empty.png": "not an image",
        "text.jpg": "not an image",
        "truncated.jpg": "broken image",
    }


def test_awkward_images_lose_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = awkward_images(tmp_path)
    status, out, err = run(capsys, "classify", str(tmp_path), BAG, *LABELS)
    assert status == 1
    answers = {Path(a["image"]).name: a for a in map(json.loads, out.splitlines())}
    assert list(answers) == [*expected, "bag.png"]
    for name, message in expected.items():
        if message:
            assert message in answers[name]["error"]
        else:
            assert len(answers[name]["predictions"]) == 5
    assert answers["bag.png"]["predictions"][0]["label"] == "bag"
    assert len(errors(err)) == sum(map(bool, expected.values()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "secret.png"
    shutil.copy(BAG, path)
    path.chmod(0)
    status, _, err = run(capsys, "classify", str(path), *LABELS)
    assert status == 1
    assert errors(err) == [f"error: {path}: Permission denied"]


def test_file_that_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loop.png"
    path.symlink_to(path)
    status, out, err = run(capsys, "classify", str(path), BAG, *LABELS)
    assert status == 1
    assert errors(err) == [f"error: {path}: Too many levels of symbolic links"]
    assert len(out.splitlines()) == 2


def test_empty_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "classify", str(tmp_path), *LABELS)
    assert status == 1
    assert errors(err) == [f"error: {tmp_path}: no images in this directory"]


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
        (["classify", BAG, *LABELS, "--steps", "3"], "need --purify cos"),
        (["classify", BAG, *LABELS, "--purify", "diff"], "needs a bundle with a diffusion prior"),
        (["classify", BAG, *LABELS, "--device", "tensorrt"], "'tensorrt' is not supported"),
        (["classify", BAG, *LABELS, "--precision", "int8"], "has no int8 encoders"),
        (["classify", BAG, *LABELS, "--bundle", "none"], "none is not a bundle"),
        (["classify", BAG, *LABELS, "--frmat", "json"], "unrecognized arguments: --frmat"),
        (["embed"], "either images or --text"),
        (["embed", BAG, "--text", "x"], "either images or --text"),
        (["embed", BAG, "-o", "/nowhere/x.npz"], "/nowhere/x.npz: No such file"),
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
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    manifest = bundle / "manifest.json"
    text = manifest.read_text()
    encoder = bundle / "image_encoder.fp32.onnx"

    def refused(message: str) -> None:
        for command in (["classify", BAG, *LABELS, "--bundle"], ["doctor"]):
            status, _, err = run(capsys, *command, str(bundle))
            assert status == 2
            (line,) = errors(err)
            assert message in line

    manifest.write_text(text.replace('"schema_version": 1', '"schema_version": 99'))
    refused("schema version 99 is not supported")
    manifest.write_text(text)
    encoder.write_bytes(encoder.read_bytes()[:-1])
    refused("image_encoder.fp32.onnx was altered")
    encoder.unlink()
    refused("image_encoder.fp32.onnx is missing")


def test_10_000_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"thing {i}\n" for i in range(9_999)) + "bag\n")
    arguments = ["classify", BAG, "--labels", str(path), "--template", "{}"]
    status, out, _ = run(capsys, *arguments, "--top-k", "10000")
    assert status == 0
    predictions = json.loads(out)["predictions"]
    assert len(predictions) == 10_000
    assert sum(p["score"] for p in predictions) == pytest.approx(1, abs=1e-3)


def test_one_label(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "classify", BAG, "--label", "anything")
    assert status == 0
    assert json.loads(out)["predictions"] == [{"label": "anything", "score": 1.0, "index": 0}]


def test_purification_options(capsys: pytest.CaptureFixture[str]) -> None:
    def score(*options: str) -> float:
        status, out, _ = run(capsys, "classify", BAG, *LABELS, *options)
        assert status == 0
        return json.loads(out)["predictions"][0]["score"]

    plain = score("--purify", "none")
    assert score() == plain  # this bundle recommends none
    moved = score("--purify", "cos", "--steps", "1", "--step-size", "0.2")
    assert abs(moved - plain) > 1e-6


def test_embed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.npz"
    status, _, _ = run(capsys, "embed", BAG, "missing.png", "-o", str(path))
    assert status == 1
    with np.load(path) as arrays:
        assert arrays["images"].tolist() == [BAG]
        assert arrays["embeddings"].shape == (1, 128)
        np.testing.assert_allclose(np.linalg.norm(arrays["embeddings"], axis=1), 1, atol=1e-6)
        expected = arrays["embeddings"][0]
    _, out, _ = run(capsys, "embed", BAG)
    np.testing.assert_allclose(json.loads(out)["embedding"], expected, atol=1e-6)
    _, out, _ = run(capsys, "embed", "--text", "a coat", "--text", "ein Mantel")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a coat", "ein Mantel"]


def test_info_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", "--format", "table")
    assert status == 0
    assert "28 x 28" in out
    assert json.loads(run(capsys, "info")[1])["embedding"] == 128
    status, out, err = run(capsys, "doctor")
    assert status == 0, err
    report = json.loads(out)
    assert report["problem"] == ""
    assert "cpu" in report["devices"]
    assert len(report["golden"]) == 3
    assert any(line.startswith("onnxruntime ") for line in report["packages"])


@pytest.mark.parametrize("command", ["classify", "embed", "info", "doctor"])
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
    assert "python -m export" in note
    assert error == "error: missing.png: no such file"
    assert json.loads(found.stdout.splitlines()[0])["predictions"][0]["label"] == "bag"


def test_reader_that_stops_early(tmp_path: Path) -> None:
    command = f"{sys.executable} -m edgeclip classify {BAG} {BAG} {' '.join(LABELS)} --batch-size 1"
    found = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in found.stderr
    assert "BrokenPipe" not in found.stderr


def test_missing_onnxruntime_is_explained() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from edgeclip.cli import main;"
        f"sys.exit(main(['classify', {BAG!r}, '--label', 'bag']))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "pip install 'edgeclip[cpu]'" in found.stderr
    assert "Traceback" not in found.stderr
