"""`python -m export.to_tensorrt` with a fake TensorRT-RTX, tests/support/gpu/fake_tensorrt.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgeclip.bundle import MANIFEST, Bundle
from edgeclip.errors import BundleError
from export import to_tensorrt
from export.to_tensorrt import graph_files, main
from tests.support.gpu import fake_tensorrt
from tests.support.paths import GARMENTS


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = fake_tensorrt.module("tensorrt_rtx-1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Copy the bundle garments, with a fused graph whose weights are in the image encoder's file."""
    path = tmp_path / "bundle"
    shutil.copytree(GARMENTS, path)
    shutil.copy(path / "image_encoder.fp32.onnx", path / "fused.fp32.onnx")
    Bundle.write_manifest(path, Bundle(path).manifest)
    return path


def test_every_graph_is_compiled_for_every_gpu(
    trt: ModuleType, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle)]) == 0
    head, *rows, skipped, end = capsys.readouterr().out.splitlines()
    assert head.split() == ["graph", "sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"]
    names = ["image_encoder.fp32", "text_encoder.fp32", "image_tokens.fp32", "fused.fp32"]
    assert [row.split()[0] for row in rows] == names
    assert all(row.count(" MB") == 6 for row in rows)
    assert "int8 graphs are quantised for ONNX Runtime on CPUs" in skipped
    assert end.startswith("compiled by tensorrt_rtx 1.7.1.116 without a GPU: no engine was run")
    assert "Jetson" in end
    actual = [(Path(build["graph"]).stem, *build["capabilities"]) for build in trt._fake.builds]
    gpus = ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
    assert actual == [(name, gpu) for name in names for gpu in gpus]


def test_options(trt: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "new" / "engines"
    options = ["--capability", "8.6", "120", "86", "--workspace", "64", "--max-batch", "4"]
    assert main([str(GARMENTS), "--precision", "fp32", *options, "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"{kind}.fp32.{gpu}.engine"
        for kind in ("image_encoder", "image_tokens", "text_encoder")
        for gpu in ("sm120", "sm86")
    ]
    image, text = (
        json.loads((out / f"{k}_encoder.fp32.sm86.engine").read_bytes()) for k in ("image", "text")
    )
    assert image["capabilities"] == ["SM86"]
    assert image["pools"] == {"WORKSPACE": 64 << 20}
    assert image["profiles"][0]["pixels"][2][0] == 4
    assert text["profiles"][0]["ids"][2] == [4, 32]  # this bundle's context length


def test_graphs_that_fail(
    trt: ModuleType, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trt._fake.refuses = "no kernel"
    assert main([str(GARMENTS), "--capability", "75", "86"]) == 1
    out, err = capsys.readouterr()
    assert out.count("fails") == 6  # three graphs, two GPUs
    lines = err.splitlines()
    assert len(lines) == 6
    assert lines[0] == (
        "error: image_encoder.fp32 for sm_75: tensorrt_rtx 1.7.1.116 cannot build "
        f"{GARMENTS / 'image_encoder.fp32.onnx'}: no kernel"
    )
    assert not caplog.records  # TensorRT's errors are in these lines


def test_a_limit_of_the_compiler_is_not_a_failure(
    trt: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    trt._fake.refuses = "Cannot compile 'x' for Turing (SM75): FP32 GEMM is not supported."
    assert main([str(GARMENTS), "--capability", "75"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("no fp32: sm_75 needs fp16 graphs in TensorRT-RTX") == 1


def test_warnings_are_printed_once(trt: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    trt._fake.warns = "Profile kMAX values are not self-consistent"
    assert main([str(GARMENTS), "--capability", "86", "89"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "kMAX" in line]
    assert lines == [
        f"warning: {name}.fp32: TensorRT: Profile kMAX values are not self-consistent"
        for name in ("image_encoder", "text_encoder", "image_tokens")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "quantised for ONNX Runtime on CPUs (at run time"),
        (["--precision", "fp32", "fp16"], "has no fp16 graphs; it has fp32, int8"),
        (["--capability", "87"], "builds for SM75, SM80, SM86, SM89, SM120, SM121, not SM87"),
        (["--capability", "8x"], "expected a capability such as 86, got '8x'"),
        (["--max-batch", "0"], "expected a whole number from 1, got '0'"),
        (["-o", str(GARMENTS)], "exists: name another folder"),
    ],
)
def test_wrong_usage_is_one_line(
    options: list[str], message: str, trt: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([str(GARMENTS), *options])
    except SystemExit as err:  # from argparse
        status = err.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert trt._fake.builds == []


def test_without_tensorrt_rtx(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module("tensorrt-10.3.0"))
    assert main([str(GARMENTS)]) == 2
    assert capsys.readouterr().err == (
        "error: tensorrt_rtx is not installed: pip install 'edgeclip[tensorrt-rtx]'\n"
    )


def test_a_bundle_of_int8_alone(
    trt: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(GARMENTS, path)
    manifest = Bundle(path).manifest
    only = {"int8": manifest.precisions["int8"]}
    Bundle.write_manifest(path, dataclasses.replace(manifest, precisions=only))
    assert main([str(path)]) == 2
    assert "has no other precision than int8: int8 graphs are" in capsys.readouterr().err


def test_altered_graphs_are_not_compiled(bundle: Path) -> None:
    data = bundle / "image_encoder.fp32.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"image_encoder.fp32.onnx.data was altered"):
        graph_files(Bundle(bundle), ["fp32"])
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["files"][data.name]
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="for which the bundle has no sha256"):
        graph_files(Bundle(bundle), ["fp32"])


def test_ctrl_c(
    trt: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_tensorrt, "build_engine", stop)
    assert main([str(GARMENTS)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
