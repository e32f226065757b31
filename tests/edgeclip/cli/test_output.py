"""Output of commands: -o destroys nothing, and JSON is valid in every locale."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgeclip
from edgeclip.cli.main import main
from edgeclip.json_output import show_json, to_json
from edgeclip.tools import build_engine
from tests.support.commands import BUNDLE
from tests.support.paths import EXAMPLES, GARMENTS

BAG = EXAMPLES / "bag.png"
DRESS = EXAMPLES / "dress.png"
TEXT = "café 😀"
RAW = b"caf\xe9 \xff.png"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """Return exit status, stdout, and the lines of stderr without the note."""
    status = main([str(argument) for argument in arguments])
    found = capsys.readouterr()
    return status, found.out, [x for x in found.err.splitlines() if not x.startswith("note: ")]


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "edgeclip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


def outputs(command: str, given: Path) -> list[object]:
    """Return arguments of a command with -o that reads `given`."""
    return [command, given, *BUNDLE, *(["--label", "bag"] if command == "explain" else []), "-o"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return Path(shutil.copy(BAG, tmp_path / "photo.png"))


# Outputs that are inputs.


@pytest.mark.parametrize("command", ["explain", "embed"])
@pytest.mark.parametrize("form", ["itself", "link", "hard link", "linked folder"])
def test_an_image_is_not_overwritten(
    picture: Path, capsys: pytest.CaptureFixture[str], command: str, form: str
) -> None:
    output = {"itself": picture, "linked folder": picture.parent / "folder" / picture.name}.get(
        form, picture.with_name("out.png")
    )
    if form == "link":
        output.symlink_to(picture)
    elif form == "hard link":
        output.hardlink_to(picture)
    elif form == "linked folder":
        (picture.parent / "folder").symlink_to(picture.parent)
    before = sorted(picture.parent.iterdir())
    status, out, errors = run(capsys, *outputs(command, picture), output)
    assert (status, out) == (2, "")
    message = f"would destroy the input {picture}; name another output"
    assert errors == [f"error: cannot write {output}: that {message}"]
    assert picture.read_bytes() == BAG.read_bytes()
    assert sorted(picture.parent.iterdir()) == before


def test_no_other_input_is_overwritten(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = tmp_path / "templates.png"
    templates.write_text("a {}\n")
    bundle = Path(shutil.copytree(GARMENTS, tmp_path / "bundle"))
    for arguments, output in (
        (["explain", *BUNDLE, BAG, picture, "--label", "bag"], picture),
        (["explain", *BUNDLE, BAG, "--label", "bag", "--template", templates], templates),
        (["embed", *BUNDLE, BAG, picture], picture),
        (["embed", *BUNDLE, tmp_path], picture),
        (["embed", *BUNDLE, BAG, "--bundle", bundle], bundle / "golden.npz"),
        (["embed", *BUNDLE, "--text", "x", "--bundle", bundle], bundle / "manifest.json"),
    ):
        before = output.read_bytes()
        status, _, (error,) = run(capsys, *arguments, "-o", output)
        assert status == 2
        assert f"would destroy the input {output}" in error
        assert output.read_bytes() == before


def test_standard_input_is_not_overwritten(picture: Path) -> None:
    with open(picture, "rb") as file:
        found = process("explain", *BUNDLE, "-", "--label", "bag", "-o", picture, stdin=file)
    assert found.returncode == 2
    assert b"would destroy the input standard input" in found.stderr
    assert picture.read_bytes() == BAG.read_bytes()


# Outputs that are no regular files.


def test_embeddings_on_stdout() -> None:
    found = process("embed", *BUNDLE, BAG, "missing.png", DRESS, "-o", "-")
    assert found.returncode == 1
    assert b"error: missing.png: no such file\n" in found.stderr
    with np.load(io.BytesIO(found.stdout)) as arrays:
        assert arrays["images"].tolist() == [str(BAG), str(DRESS)]
        assert arrays["embeddings"].shape == (2, 128)


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/proc/self/fd/1"])
def test_a_picture_on_stdout_is_alone_there(name: str, tmp_path: Path) -> None:
    command = ["explain", *BUNDLE, BAG, "--label", "bag", "--format", "json", "-o", name]
    piped = process(*command)
    with open(tmp_path / "file", "w+b") as file:
        subprocess.run(
            [sys.executable, "-m", "edgeclip", *command], stdout=file, check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    assert piped.returncode == 0
    for data in (piped.stdout, (tmp_path / "file").read_bytes()):
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.format == "PNG"
        assert data.endswith(b"IEND\xaeB`\x82")
    report = json.loads(piped.stderr[piped.stderr.index(b"{\n") :])
    assert report["output"] == name
    assert report["label"] == "bag"


def test_a_fifo_gets_the_picture_and_stays(tmp_path: Path) -> None:
    """Write pictures to a pipe, also as TIFF, whose writer seeks."""
    reference, fifo = tmp_path / "picture.tif", tmp_path / "fifo.tif"
    os.mkfifo(fifo)
    command = ["explain", *BUNDLE, str(BAG), "--label", "bag", "-o"]
    assert main([*command, str(reference)]) == 0
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert main([*command, str(fifo)]) == 0
    reader.join()
    assert found == [reference.read_bytes()]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("command", ["explain", "embed"])
def test_devices_stay(
    command: str, devices: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *outputs(command, BAG), devices["null"])[0] == 0
    status, _, errors = run(capsys, *outputs(command, BAG), devices["full"])
    reason = "No space left on device"
    assert (status, errors) == (2, [f"error: cannot write {devices['full']}: {reason}"])
    assert all(stat.S_ISCHR(path.stat().st_mode) for path in devices.values())


@pytest.mark.parametrize("command", ["explain", "embed"])
def test_a_reader_that_stops_early_is_no_error(command: str) -> None:
    words = map(str, outputs(command, BAG))
    line = f"set -o pipefail; {sys.executable} -m edgeclip {' '.join(words)} - | head -c 0"
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert [x for x in found.stderr.splitlines() if not x.startswith("note: ")] == []


def test_a_terminal_gets_no_binary_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    status, out, (error,) = run(capsys, "embed", *BUNDLE, BAG, "-o", "-")
    assert (status, out) == (2, "")
    assert error == "error: -o - would write binary data to the terminal: redirect it"


# Regular files.


@pytest.mark.parametrize("command", ["explain", "embed"])
def test_a_file_keeps_its_mode_and_its_links(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, link, part = (tmp_path / name for name in ("target.png", "link.png", "link.png.part"))
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to("target.png")
    part.write_text("mine")
    assert run(capsys, *outputs(command, BAG), link)[0] == 0
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert target.stat().st_size > 1000
    assert part.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [link, part, target]


@pytest.mark.parametrize("command", ["explain", "embed"])
def test_what_cannot_be_written_is_told_before_the_work(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("explain", "embed_each"):
        monkeypatch.setattr(edgeclip.Runtime, name, lambda *_, **__: iter(pytest.fail, None))
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (
        ("loop.png", os.strerror(40)),
        ("folder.png", "Is a directory"),
        ("none/out.png", "No such file or directory"),
    ):
        status, out, errors = run(capsys, *outputs(command, BAG), tmp_path / name)
        assert (status, out) == (2, "")
        assert errors == [f"error: cannot write {tmp_path / name}: {reason}"]


# JSON.


class Terminal(io.TextIOWrapper):
    """Replace stdout by one in another encoding, as PYTHONIOENCODING does."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def read_bytes(self) -> bytes:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue()


def written(encoding: str, arguments: Iterable[object]) -> bytes:
    with contextlib.redirect_stdout(Terminal(encoding)) as out:
        status = main([str(argument) for argument in arguments])
        assert status in (0, 2)
        return out.read_bytes()


def refuse(constant: str) -> None:
    pytest.fail(f"{constant} is no JSON")


def parsed(data: bytes) -> Any:
    return json.loads(data.decode("utf-8"), parse_constant=refuse)


@pytest.fixture(params=["ascii", "latin-1", "utf-16", "utf-8"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def raw_picture(tmp_path: Path) -> Path:
    """Return a picture whose name is no valid text."""
    return Path(shutil.copy(BAG, os.fsdecode(os.fsencode(tmp_path) + b"/" + RAW)))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle whose folder and description are not ASCII."""
    folder = Path(shutil.copytree(GARMENTS, tmp_path / TEXT))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"description": TEXT}))
    return folder


def test_classify(encoding: str, raw_picture: Path) -> None:
    command = ["classify", *BUNDLE, raw_picture, "--label", TEXT, "--format"]
    (answer,) = parsed(written(encoding, [*command, "json"]))
    assert answer == parsed(written(encoding, [*command, "jsonl"]))
    assert os.fsencode(answer["image"]) == os.fsencode(raw_picture)
    assert answer["predictions"][0]["label"] == TEXT
    text = written(encoding, [*command, "csv"]).decode("utf-8")
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["label"] == TEXT
    assert row["image"].endswith("caf\\udce9 \\udcff.png")


def test_tables_stay_in_the_locales_encoding(raw_picture: Path) -> None:
    command = ["classify", *BUNDLE, raw_picture, "--label", TEXT, "--format", "table"]
    lines = written("latin-1", command).decode("latin-1").splitlines()
    assert lines[0].endswith("caf\\udce9 \\udcff.png")
    assert lines[1].endswith("café \\U0001f600")


def test_embed(encoding: str, raw_picture: Path) -> None:
    assert parsed(written(encoding, ["embed", *BUNDLE, "--text", TEXT]))["text"] == TEXT
    record = parsed(written(encoding, ["embed", *BUNDLE, raw_picture]))
    assert os.fsencode(record["image"]) == os.fsencode(raw_picture)


def test_explain(encoding: str, raw_picture: Path) -> None:
    output = raw_picture.with_name(f"out {raw_picture.name}")
    report = parsed(
        written(encoding, ["explain", *BUNDLE, raw_picture, "--label", TEXT, "-o", output])
    )
    assert report["label"] == TEXT
    assert os.fsencode(report["images"][0]) == os.fsencode(raw_picture)
    assert os.fsencode(report["output"]) == os.fsencode(output)
    assert output.is_file()


def test_explain_on_stderr(raw_picture: Path) -> None:
    """Write valid JSON to stderr beside a picture on stdout."""
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    command = ["explain", *BUNDLE, raw_picture, "--label", TEXT, "-o", "-"]
    found = process(*command, env=environment)
    assert found.returncode == 0
    assert parsed(found.stderr[found.stderr.index(b"{\n") :])["label"] == TEXT


def test_info_and_doctor(encoding: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.tools.golden.check", lambda _: {})
    report = parsed(written(encoding, ["info", bundle, "--format", "json"]))
    assert (report["bundle"], report["description"]) == (str(bundle), TEXT)
    report = parsed(written(encoding, ["doctor", bundle, "--device", "cpu", "--format", "json"]))
    assert report["bundle"] == f"{bundle}: {TEXT}"


def test_cache(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsencode(tmp_path) + "/é 😀".encode() + b"\xff"
    monkeypatch.setenv("EDGECLIP_CACHE", os.fsdecode(folder))
    report = parsed(written(encoding, ["cache", "--format", "json"]))
    assert os.fsencode(report["path"]).startswith(folder)


def test_build(encoding: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_engine, "build", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(build_engine, "describe", lambda _: {"engine": TEXT})
    assert parsed(written(encoding, ["build", bundle, "--format", "json"])) == {"engine": TEXT}


def test_bench(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {"measured": [], "failed": [], "bundle": TEXT, "frames_per_second": float("inf")}
    monkeypatch.setattr("edgeclip.tools.bench.run", lambda *_: report)
    found = parsed(written(encoding, ["bench", "--format", "json"]))
    assert found == report | {"frames_per_second": None}


@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_whole_process_in_another_locale(locale: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(TEXT, encoding="utf-8")
    picture = os.fsencode(tmp_path) + b"/" + RAW
    shutil.copy(BAG, picture)
    environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "edgeclip", "classify", *BUNDLE, picture, "--labels", labels]
    found = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    assert parsed(found.stdout)["predictions"][0]["label"] == TEXT


def test_numbers_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([[np.nan, 1, -np.inf]], np.float32)
    monkeypatch.setattr(edgeclip.Runtime, "embed_texts", lambda *_: rows)
    record = parsed(written("utf-8", ["embed", *BUNDLE, "--text", "x"]))
    assert record == {"text": "x", "embedding": [None, 1, None]}


def test_json_text() -> None:
    value = {"é": [1.5, float("nan"), (float("inf"), "\udcff😀\n")], "n": None, "i": 10**30}
    expected = {"é": [1.5, None, [None, "\udcff😀\n"]], "n": None, "i": 10**30}
    for indent in (None, 2):
        text = to_json(value, indent)
        assert parsed(text.encode("utf-8")) == expected
        assert "é" in text
        assert "😀" in text
    assert to_json({"a": 1}) == json.dumps({"a": 1})
    with pytest.raises(TypeError):
        to_json(object())


def test_json_goes_to_any_stream() -> None:
    plain, latin = io.StringIO(), Terminal("latin-1")
    for out in (plain, latin):
        show_json([TEXT], out=out)
    assert plain.getvalue() == f'["{TEXT}"]\n'
    assert latin.read_bytes() == f'["{TEXT}"]\n'.encode()
