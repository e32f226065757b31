"""Inputs of the commands: files, folders, patterns, standard input and awkward names."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import BUNDLE, errors, run
from tests.support.paths import EXAMPLES

BAG = str(EXAMPLES / "bag.png")
LABELS = [*BUNDLE, "--labels", str(EXAMPLES / "labels.txt")]


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


def test_labels_that_cannot_be_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for labels in (["Trousers", "trousers"], ["caf\u00e9", "cafe\u0301"]):
        arguments = [word for label in labels for word in ("--label", label)]
        status, out, err = run(capsys, "classify", BAG, *BUNDLE, *arguments)
        assert (status, out) == (2, "")
        (line,) = errors(err)
        assert line.startswith(f"error: labels {labels[0]!r} and {labels[1]!r} cannot be told")
    (tmp_path / "labels.txt").write_text("bag | a sketch of a {}\ndress | a sketch of a {}\n")
    status, out, _ = run(capsys, "classify", BAG, *BUNDLE, "--labels", str(tmp_path / "labels.txt"))
    assert status == 0
    assert len({p["score"] for p in json.loads(out)["predictions"]}) == 2


def test_labels_and_templates_from_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(raw: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return run(capsys, *arguments)

    status, out, _ = said(b"dress\nbag\n", "classify", BAG, *BUNDLE, "--labels", "-")
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
        f"{sys.executable} -m edgeclip classify {BAG} --bundle garments --labels <(printf 'dress\\nbag\\n') "
        "--template <(echo 'a sketch of a {}')"
    )
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["predictions"][0]["label"] == "bag"


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
