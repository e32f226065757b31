"""`python -m export.fused`: files, refusals, and the fused graphs of a bundle."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

import edgeclip
from edgeclip.bundle import Bundle
from edgeclip.onnx_file import locations
from edgeclip.purify import CosPurifier, DiffPurifier
from export import ExportError, bundle, fused
from export.__main__ import main as export_main
from export.bundle import export_bundle
from export.checks import evidence
from export.fused import main, write_fused
from export.graphs import save
from export.graphs.fused import Head
from tests.support.models.export_models import exported, reuse_encoders
from tests.support.models.fused_graphs import (
    answers,
    images_of,
    open_graph,
    random_labels,
    runtime_of,
)
from tests.support.paths import EXAMPLES
from train.models.wording import wording


def test_a_bundle_lists_its_fused_graph_which_shares_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = exported("vit")
    data = "image_encoder.fp32.onnx.data"
    reuse_encoders(monkeypatch, tiny)
    purifier = CosPurifier(1, 0.4)
    words = wording(tiny.source)
    export_bundle(tiny.source, tmp_path / "b", words, purification=purifier, fused=True)
    result = Bundle(tmp_path / "b")
    path = result.file("fused.fp32.onnx")  # checks its sha256
    assert locations(path) == {data}
    assert path.stat().st_size < 0.2 * (tmp_path / "b" / data).stat().st_size
    runtime, images = runtime_of(result, purifier), images_of(result, 3)
    labels = random_labels(runtime, 9)
    inputs = {"image": images, "classes": labels.embeddings}
    expected = answers(runtime, images, labels, 5)[0]
    np.testing.assert_allclose(open_graph(path).run(None, inputs)[0], expected, atol=1e-5)

    monkeypatch.setattr(save, "SINGLE_FILE", 1000)
    out = tmp_path / "elsewhere" / "f.onnx"  # with its own weights
    out.parent.mkdir()
    options = ["--purify", "cos", "--steps", "1", "--step-size", "0.4"]
    assert main([str(result.path), "-o", str(out), *options]) == 0
    assert sorted(p.name for p in out.parent.iterdir()) == ["f.onnx", "f.onnx.data"]
    assert {p.stat().st_mode & 0o777 for p in out.parent.iterdir()} == {path.stat().st_mode & 0o777}
    assert locations(out) == {"f.onnx.data"}
    shutil.rmtree(result.path)
    np.testing.assert_allclose(open_graph(out).run(None, inputs)[0], expected, atol=1e-5)


def test_a_graph_that_answers_otherwise_is_refused(tmp_path: Path) -> None:
    runtime = runtime_of(exported("vit").bundle, None)
    for head in (Head(CosPurifier(1, 0.5)), Head(CosPurifier(1, 0.5), None)):
        with pytest.raises(ExportError, match=r"f.onnx does not match the runtime: a"):
            write_fused(runtime, tmp_path / "f.onnx", head)


def test_a_failed_comparison_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.onnx"
    out.write_text("old")
    monkeypatch.setattr(fused, "compare", lambda *_: float("nan"))
    assert main([str(exported("vit").bundle.path), "-o", str(out), "--force"]) == 2
    assert "a probability differs by nan" in capsys.readouterr().err
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_classes_for_another_runtime(tmp_path: Path) -> None:
    source = str(exported("vit").bundle.path)
    labels = tmp_path / "labels.txt"
    labels.write_text("# comment\ncat\n\ndog | a dog | the puppy\n")
    expected = runtime_of(Bundle(source), None).labels(edgeclip.read_labels(labels)).embeddings
    for name in ("classes.npy", "classes.bin"):
        assert main([source, "--classes-for", str(labels), "-o", str(tmp_path / name)]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "classes.npy"), expected)
    raw = np.fromfile(tmp_path / "classes.bin", "<f4").reshape(2, -1)
    np.testing.assert_array_equal(raw, expected)
    again = tmp_path / "worded.npy"
    inputs = ["--classes-for", str(labels), "-o", str(again), "--template", "my own {}"]
    assert main([source, *inputs]) == 0
    assert np.abs(np.load(again)[0] - expected[0]).max() > 1e-4
    np.testing.assert_array_equal(np.load(again)[1], expected[1])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["-o", "old.onnx"], "old.onnx exists: add --force to replace it"),
        (["-o", "f.pb"], "f.pb: name a file that ends in .onnx"),
        (["-o", "f.onnx", "--classes-for", "l"], "f.onnx: name a file that ends in .npy or .bin"),
        (["-o", "f.npy", "--classes-for", "l", "--labels", "l"], "use one of the two"),
        (["-o", "f.onnx", "--steps", "3"], "--steps needs --purify cos"),
        (["-o", "f.onnx", "--precision", "int8"], "has no int8 encoders; it has fp32"),
        (["-o", "f.onnx", "--labels", "none.txt"], "none.txt: No such file or directory"),
        (["-o", "nowhere/f.onnx"], "No such file or directory"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.onnx").write_text("old")
    assert main([str(exported("vit").bundle.path), *arguments]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert line in err[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]


def test_a_graph_replaces_the_target_of_a_link_and_keeps_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "SINGLE_FILE", 0)  # weights in a second file
    target, link = tmp_path / "target.onnx", tmp_path / "link.onnx"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to("target.onnx")
    command = [str(exported("vit").bundle.path), "-o", str(link)]
    assert main(command) == 2
    assert target.read_text() == "old"
    assert main([*command, "--force"]) == 0
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert locations(link) == {"target.onnx.data"}
    open_graph(link)
    names = {"link.onnx", "target.onnx", "target.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_weights_of_another_graph_are_replaced_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.onnx.data").write_text("mine")
    assert main([str(exported("vit").bundle.path), "-o", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err.endswith("a.onnx.data exists: add --force to replace it\n")
    assert (tmp_path / "a.onnx.data").read_text() == "mine"


@pytest.mark.parametrize("kind", ["labels", "classes", "template", "bundle", "weights"])
def test_inputs_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = Path(shutil.copytree(exported("vit").bundle.path, tmp_path / "bundle"))
    text = tmp_path / ("given.npy" if kind == "classes" else "given.onnx")
    text.write_text("a {}\n")
    name = next(name for name in Bundle(source).manifest.files if name.startswith("image_encoder"))
    output, more = {
        "labels": (text, ["--labels", text]),
        "classes": (text, ["--classes-for", text]),
        "template": (text, ["--template", text, "--labels", EXAMPLES / "labels.txt"]),
        "bundle": (source / name, []),
        "weights": (tmp_path / "out.onnx", ["--labels", tmp_path / "out.onnx.data"]),
    }[kind]
    if kind == "weights":
        (tmp_path / "out.onnx.data").write_text("a\n")
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([str(source), "-o", str(output), "--force", *map(str, more)]) == 2
    assert "that would destroy the input" in capsys.readouterr().err
    for path, before in contents.items():
        assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".onnx", ".npy", ".bin"])
def test_a_fifo_takes_what_a_file_takes(tmp_path: Path, suffix: str) -> None:
    labels = str(EXAMPLES / "labels.txt")
    more = [] if suffix == ".onnx" else ["--classes-for", labels]
    fifo, file = tmp_path / f"fifo{suffix}", tmp_path / f"file{suffix}"
    os.mkfifo(fifo)
    command = [str(exported("vit").bundle.path), *more, "-o"]
    assert main([*command, str(file)]) == 0
    actual: list[bytes] = []
    reader = threading.Thread(target=lambda: actual.append(fifo.read_bytes()), daemon=True)
    reader.start()
    assert main([*command, str(fifo)]) == 0
    reader.join()
    assert actual == [file.read_bytes()]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {fifo.name, file.name}


def test_a_fifo_takes_no_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(save, "SINGLE_FILE", 0)
    os.mkfifo(tmp_path / "fifo.onnx")
    assert main([str(exported("vit").bundle.path), "-o", str(tmp_path / "fifo.onnx")]) == 2
    assert "takes one file, but large weights need a second" in capsys.readouterr().err


def test_the_command_makes_one_and_refuses_a_diffusion_prior_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, out = exported("vit"), tmp_path / "bundle"
    reuse_encoders(monkeypatch, tiny)
    assert export_main([str(tiny.folder), "-o", str(out)]) == 0
    assert not list(out.glob("fused*"))  # not requested
    assert export_main([str(tiny.folder), "-o", str(out), "--fused", "--force"]) == 0
    assert "fused.fp32.onnx" in Bundle(out).manifest.files

    monkeypatch.setattr(evidence, "read", lambda *_: ((), DiffPurifier()))
    monkeypatch.setattr(bundle, "export_bundle", pytest.fail)
    assert export_main([str(tiny.folder), "-o", str(tmp_path / "b"), "--fused"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: the bundle recommends CLIPure-Diff, which fused graphs do not support"
    )
