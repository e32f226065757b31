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
from PIL import Image
from tqdm import tqdm

from edgeclip import Runtime, _core
from edgeclip.bundle import EMBEDDED
from edgeclip.progress import text_progress
from edgeclip.text.cache import FILE
from tests.support.commands import errors, run
from tests.support.paths import EXAMPLES

BAG = str(EXAMPLES / "bag.png")
LABELS = ["--labels", str(EXAMPLES / "labels.txt")]


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


def test_unreadable_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret.png"
    shutil.copy(BAG, path)
    open_image = Image.open

    def refuse(file: object, **options: object) -> Image.Image:  # as the system does, but for root
        if file == str(path):
            raise PermissionError(13, "Permission denied", file)
        return open_image(file, **options)

    monkeypatch.setattr(Image, "open", refuse)
    status, out, err = run(capsys, "classify", str(path), BAG, *LABELS)
    assert status == 1
    assert errors(err) == [f"error: {path}: Permission denied"]
    assert len(out.splitlines()) == 2


def test_file_that_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loop.png"
    path.symlink_to(path)
    status, out, err = run(capsys, "classify", str(path), BAG, *LABELS)
    assert status == 1
    assert errors(err) == [f"error: {path}: Too many levels of symbolic links"]
    assert len(out.splitlines()) == 2


def test_names_that_the_system_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "classify", "", "x" * 5000, BAG, *LABELS)
    assert status == 1
    assert [error.rpartition(": ")[2] for error in errors(err)] == [
        "no such file",
        "File name too long",
    ]
    assert json.loads(out.splitlines()[2])["predictions"][0]["label"] == "bag"


def test_directory_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(BAG, tmp_path / "a.png")
    secret = tmp_path / "secret"
    secret.mkdir()
    scandir = os.scandir

    def refuse(path: str):  # type: ignore[no-untyped-def]  # as the system does for others than root
        if Path(path) == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, out, err = run(capsys, "classify", str(tmp_path), *LABELS)
    assert status == 1
    assert len(errors(err)) == 1
    assert str(secret) in errors(err)[0]
    assert json.loads(out.splitlines()[0])["predictions"][0]["label"] == "bag"


def test_error_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "float.tiff"
    Image.new("F", (4, 4)).save(path)
    _, _, err = run(capsys, "classify", str(path), *LABELS)
    assert errors(err)[0].startswith(f"error: {path}: floating-point images")


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
        (
            ["classify", BAG, *LABELS, "--device", "tensorrt"],
            "'tensorrt' needs edgeclip with its CUDA kernels",
        ),
        (["classify", BAG, *LABELS, "--precision", "fp16"], "has no fp16 encoders"),
        (["classify", BAG, *LABELS, "--bundle", "none"], "none is not a bundle"),
        (["classify", BAG, *LABELS, "--frmat", "json"], "unrecognized arguments: --frmat"),
        (["classify", BAG, "--labels", ""], "No such file"),
        (["classify", BAG, *LABELS, "--top-k", "9" * 23], "a whole number from 1"),
        (["classify", BAG, *LABELS, "--threads", "5000"], "a whole number up to 1024"),
        (["classify", BAG, *LABELS, "--batch-size", "100000000"], "a whole number up to 4096"),
        (["classify", BAG, *LABELS, "--purify", "cos", "--steps", "10001"], "up to 10000"),
        (["classify", BAG, "--label", "caf\udce9"], "is not valid text"),
        (["classify", BAG, *LABELS, "--template", "x" * 5000], "has no {}"),
        (["embed"], "either images or --text"),
        (["embed", BAG, "--text", "x"], "either images or --text"),
        (["embed", BAG, "-o", "/nowhere/x.npz"], "/nowhere/x.npz: No such file"),
        (["embed", BAG, "-o", ""], "error: "),
        (["explain"], "required: IMAGE, --label, -o/--output"),
        (["explain", BAG, "--label", "x"], "required: -o/--output"),
        (["explain", BAG, "--label", "x", "-o", "x"], "cannot write images of the kind ''"),
        (["explain", BAG, "--label", "x", "-o", "x.psd"], "the kind '.psd'; try .png"),
        (["explain", BAG, "--label", "x", "-o", "/nowhere/x.png"], "/nowhere/x.png: No such file"),
        (["explain", BAG, "--label", "", "-o", "/tmp/x.png"], "a label, or one of its prompts"),
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
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
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
    arguments = ["classify", BAG, "--labels", str(path), "--template", "{}"]
    status, out, _ = run(capsys, *arguments, "--top-k", "10000")
    assert status == 0
    predictions = json.loads(out)["predictions"]
    assert len(predictions) == 10_000
    assert sum(p["score"] for p in predictions) == pytest.approx(1, abs=1e-3)


def test_one_label(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "classify", BAG, "--label", "anything")
    assert status == 0
    assert json.loads(out)["predictions"] == [{"label": "anything", "score": 1.0, "index": 0}]
    note = "note: one label alone always scores 100 %; add others to compare it with"
    assert [line.startswith(note) for line in err.splitlines()].count(True) == 1
    two = run(capsys, "classify", BAG, "--label", "anything", "--label", "something else")
    assert note not in two[2]


def test_nothing_is_said_of_one_label_in_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert Runtime(labels=["anything"]).classify(BAG)[0].score == 1
    assert "one label" not in "".join(capfd.readouterr())


def test_labels_that_cannot_be_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for labels in (["Trousers", "trousers"], ["caf\u00e9", "cafe\u0301"]):
        arguments = [word for label in labels for word in ("--label", label)]
        status, out, err = run(capsys, "classify", BAG, *arguments)
        assert (status, out) == (2, "")
        (line,) = errors(err)
        assert line.startswith(f"error: labels {labels[0]!r} and {labels[1]!r} cannot be told")
    (tmp_path / "labels.txt").write_text("bag | a sketch of a {}\ndress | a sketch of a {}\n")
    status, out, _ = run(capsys, "classify", BAG, "--labels", str(tmp_path / "labels.txt"))
    assert status == 0
    assert len({p["score"] for p in json.loads(out)["predictions"]}) == 2


def test_labels_and_templates_from_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(raw: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return run(capsys, *arguments)

    status, out, _ = said(b"dress\nbag\n", "classify", BAG, "--labels", "-")
    assert status == 0
    assert json.loads(out)["predictions"][0]["label"] == "bag"
    templates = said(b"my {}\na {}.\n", "classify", BAG, *LABELS, "--template", "-")
    given = said(b"", "classify", BAG, *LABELS, "--template", "my {}", "--template", "a {}.")
    assert templates == given
    for arguments in (
        ["classify", "-", "--labels", "-"],
        ["classify", BAG, "--labels", "-", "--template", "-"],
        ["explain", "-", "--label", "bag", "--template", "-", "-o", "x.png"],
        ["embed", "-", "-"],
        ["embed", "-", BAG, "-", "-o", "x.npz"],
        ["bench", "--image", "-", "--labels", "-"],
        ["build", "--images", BAG, "-", "--labels", "-"],
        ["build", "--images", "-", "-", "--labels", BAG],
    ):
        status, out, err = said(b"bag\ndress\n", *arguments)
        assert (status, out) == (2, "")
        assert errors(err) == [
            "error: - is given twice, but standard input can be read only once: name files"
        ]


def test_labels_and_templates_of_another_process() -> None:
    command = (
        f"{sys.executable} -m edgeclip classify {BAG} --labels <(printf 'dress\\nbag\\n') "
        "--template <(echo 'a sketch of a {}')"
    )
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["predictions"][0]["label"] == "bag"


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
    status, _, _ = run(capsys, "embed", BAG, "missing.png", "-o", str(path))
    assert status == 1
    with np.load(path) as arrays:
        assert arrays["images"].tolist() == [BAG]
        assert arrays["embeddings"].shape == (1, 128)
        assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
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
    assert report["device used"]
    assert any(line.startswith("cpu int8: works") for line in report["devices"])
    if not _core.cuda_built():
        (why,) = (line for line in report["devices"] if line.startswith("tensorrt: not used: "))
        assert "needs edgeclip with its CUDA kernels" in why
    assert any(line.startswith("onnxruntime ") for line in report["packages"])


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.PNG"
    arguments = ["explain", BAG, "--label", " bag ", "--template", "my {}", "-o", str(path)]
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
    arguments = ["--label", "bag", "-o", str(path)]
    status, out, _ = run(capsys, "explain", BAG, "-", *arguments)
    assert status == 0
    report = json.loads(out)
    assert report["images"] == [BAG, "-"]
    assert report["similarities"][0] == report["similarities"][1]
    assert report["map distance"] == 0
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
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"tokens": None}))
    for arguments, message in (
        ([BAG, "missing.png"], "missing.png: no such file"),
        ([str(EXAMPLES)], f"{EXAMPLES}: no images in this directory"),
        ([BAG, "--bundle", str(bundle)], "has no patch tokens: export a ViT"),
    ):
        status, out, err = run(capsys, "explain", *arguments, "--label", "bag", "-o", str(path))
        assert status == 2
        assert out == ""
        (line,) = errors(err)
        assert line.endswith(message)
    assert path.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out.png"]


def test_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "cache", "--format", "table")
    assert status == 0
    assert re.search(r"^encoders +none$", out, re.MULTILINE)
    assert run(capsys, "classify", BAG, *LABELS, "--precision", "int8")[0] == 0
    (file,) = cache.glob("*.sqlite")
    status, out, _ = run(capsys, "cache")
    assert status == 0
    report = json.loads(out)
    (share,) = report.pop("encoders")
    size = file.stat().st_size
    assert report.pop("engines") == []
    assert report.pop("trials") == 1
    assert report == {"path": str(file), "labels": 10, "bytes": size, "limit bytes": 1 << 28}
    assert (share["labels"], share["bytes"]) == (10, 10 * 128 * 4)
    assert "int8" in share["encoder"]
    assert "labels 10, bytes 5120" in run(capsys, "cache", "--format", "table")[1]
    status, out, _ = run(capsys, "cache", "--clear")
    report = json.loads(out)
    assert report.pop("freed bytes") > size  # with the trials of precisions
    assert report == {"path": str(file)}
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_cache_that_cannot_be_used(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache / FILE
    path.write_bytes(b"spoilt")
    status, out, err = run(capsys, "cache")
    assert (status, out) == (2, "")
    assert "is damaged" in err
    assert "edgeclip cache --clear" in err
    assert run(capsys, "cache", "--clear")[0] == 0
    path.mkdir()
    status, out, err = run(capsys, "cache", "--clear")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: cannot delete {path} (")
    monkeypatch.setenv("EDGECLIP_CACHE_SIZE", "big")
    for arguments in (["cache"], ["classify", BAG, *LABELS]):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        (line,) = errors(err)
        assert line.startswith("error: EDGECLIP_CACHE_SIZE is 'big': expected bytes")


@pytest.mark.parametrize("command", ["classify", "embed", "explain", "cache", "info", "doctor"])
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
    command = f"{sys.executable} -m edgeclip classify {' '.join([BAG] * 300)} {' '.join(LABELS)}"
    found = subprocess.run(  # 300 lines do not fit into a pipe that nobody reads
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0
    assert errors(found.stderr) == []


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-"])
def test_closed_streams(closed: str) -> None:
    command = f"{sys.executable} -m edgeclip classify {BAG} {' '.join(LABELS)} {closed}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert errors(found.stderr) == []
    assert ('"bag"' in found.stdout) == (closed != ">&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk() -> None:
    command = f"{sys.executable} -m edgeclip classify {BAG} {' '.join(LABELS)} > /dev/full"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert errors(found.stderr) == ["error: No space left on device"]


def test_file_name_that_is_not_text(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    shutil.copy(BAG, name)
    command = [sys.executable, "-m", "edgeclip", "classify", name, "missing.png", BAG, *LABELS]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    found = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert found.returncode == 1
    first, _, last = map(json.loads, found.stdout.decode().splitlines())
    assert os.fsencode(first["image"]) == os.fsencode(name)
    assert last["predictions"][0]["label"] == "bag"


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
