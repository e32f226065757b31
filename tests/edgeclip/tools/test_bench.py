"""Reports and errors of `edgeclip bench`; no figure is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeclip
from edgeclip.tools import bench
from tests.support.commands import errors, run
from tests.support.paths import EXAMPLES, GARMENTS

QUICK = ["garments", "--repeats", "2", "--batch-size", "2", "1", "2"]
STAGES = [
    "decode",
    "preprocess",
    "image_encoder",
    "classify",
    "encoder_and_classify",
    "frame_to_answer",
    "file_to_answer",
]
SETTINGS = bench.Settings(image=bench.read_image(None), repeats=1, batch_sizes=(1,))


def check_measured(found: dict[str, Any], runs: int) -> None:
    assert list(found["stages_ms"]) == STAGES
    for ms in found["stages_ms"].values():
        assert 0 < ms["p50"] <= ms["p90"] <= ms["p99"]
        assert ms["runs"] == runs
    assert [row["size"] for row in found["batches"]] == [1, 2]
    for row in found["batches"]:
        assert row["frames_per_second"] > 0
        assert row["prepared_per_second"] > 0
    assert found["labels_per_second"] > 0
    assert found["opened_ms"] > 0
    assert found["first_answer_ms"] > 0
    assert 10 < found["memory_mb"]["resident"] <= found["memory_mb"]["peak"]


def test_json_of_every_precision(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, "bench", *QUICK, "--device", "cpu")
    assert status == 0
    assert err == ""  # no note about the demonstration, which each process would repeat
    report = json.loads(out)
    assert report["bundle"] == str(GARMENTS)
    assert report["image"].startswith("640x480, a file of ")
    assert report["labels"] == 1000
    assert report["failed"] == []
    assert 1 <= report["machine"]["cores"] <= len(os.sched_getaffinity(0))
    assert report["versions"]["numpy"] == np.__version__
    manifest = edgeclip.Bundle("garments").manifest
    assert [found["precision"] for found in report["measured"]] == list(manifest.precisions)
    for found in report["measured"]:
        assert found["device"] == "cpu"
        assert found["purification"] == "none"  # what this bundle recommends
        assert found["prompts_per_label"] == len(manifest.templates)
        check_measured(found, runs=2)


def test_table_own_image_labels_and_purification(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--image", str(EXAMPLES / "bag.png"), "--labels", str(EXAMPLES / "labels.txt")]
    arguments += ["--label", "hat", "--purify", "cos", "--precision", "fp32", "--threads", "1"]
    status, out, _ = run(capfd, "bench", *QUICK, *arguments, "--format", "table")
    assert status == 0
    assert "image 28x28, a file of " in out
    assert " 11 labels" in out
    assert "cpu fp32, purification cos 10 x 30" in out
    lines = out.splitlines()
    for stage in STAGES:
        (line,) = (line for line in lines if line.startswith(f"  {stage.replace('_', ' ')} "))
        *_, p50, p90, p99, runs = line.split()
        assert 0 <= float(p50) <= float(p90) <= float(p99)
        assert runs == "2"
    assert any(line.startswith("  batch 2: ") for line in lines)


def test_what_fails_is_named_and_the_rest_measured(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = list(edgeclip.Bundle("garments").manifest.precisions)
    missing = next(name for name in ("fp16", "int8") if name not in known)
    status, out, err = run(
        capfd, "bench", *QUICK, "--device", "cpu", "--precision", "fp32", missing
    )
    assert status == 1
    report = json.loads(out)
    assert [found["precision"] for found in report["measured"]] == ["fp32"]
    (failed,) = report["failed"]
    expected = f"{GARMENTS} has no {missing} encoders; it has {', '.join(known)}"
    assert failed == {"device": "cpu", "precision": missing, "error": expected}
    assert errors(err) == [f"error: cpu {missing}: {expected}"]

    # A driver that lets down.
    monkeypatch.setattr(bench, "why_not", lambda _, device: "" if device == "cuda" else "absent")
    if "CUDAExecutionProvider" not in __import__("onnxruntime").get_available_providers():
        status, out, err = run(capfd, "bench", *QUICK, "--precision", "fp32")
        assert status == 2
        assert json.loads(out)["measured"] == []
        assert errors(err)[0].startswith("error: cuda fp32: device 'cuda' needs ONNX Runtime's")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "missing.png"], "missing.png: no such file"),
        (["--image", __file__], "test_bench.py"),
        (["--labels", "missing.txt"], "missing.txt: No such file"),
        (["--label", "a", "--label", "a"], "label 'a' is there twice"),
        (["no-such-bundle"], "no-such-bundle"),
        (["--batch-size", "0"], "--batch-size: expected a whole number from 1"),
        (["--batch-size", "5000"], "expected a whole number up to 4096"),
        (["--seconds", "0"], "--seconds: expected seconds up to 3600, got '0'"),
        (["--seconds", "nan"], "--seconds: expected seconds up to 3600, got 'nan'"),
        (["--seconds", "1", "--repeats", "1"], "not allowed with argument"),
        (["--precision", "fp64"], "invalid choice: 'fp64'"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capfd, "bench", *arguments)
    assert status == 2
    assert out == ""
    (line,) = errors(err)
    assert line.startswith("error: ")
    assert message in line


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(edgeclip.EdgeclipError, match="process died; is memory short"):
        bench._in_new_process(os._exit, 9)  # as the kernel does where memory runs out


def test_times_are_of_the_call_alone_and_as_many_as_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert bench.times_ms(call, seconds=0, repeats=7) == [250.0] * 7
    assert bench.times_ms(call, seconds=2, repeats=None) == [250.0] * 8
    assert bench.times_ms(call, seconds=0.1, repeats=None) == [250.0] * bench.MIN_RUNS


def test_percentiles() -> None:
    found = bench.percentiles([float(i) for i in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "runs": 101}


def test_classify_alone_does_what_a_runtime_does() -> None:
    rt = edgeclip.Runtime("garments", purify=edgeclip.CosPurifier(3, 0.5))
    labels = rt.labels(["bag", "dress", "shirt"])
    image = EXAMPLES / "bag.png"
    embedding = rt.encode(rt.preprocess([image]))
    indices, scores = bench._classify(rt, embedding, labels)()  # type: ignore[misc]
    expected = rt.classify(image, labels)
    assert indices[0].tolist() == [prediction.index for prediction in expected]
    np.testing.assert_allclose(scores[0], [prediction.score for prediction in expected], rtol=1e-6)


def test_progress_where_a_person_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"a": int, "b": int}
    assert list(bench._with_progress(calls, "cpu fp32")) == list(calls.items())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(bench, "PROGRESS_DELAY", 0)
    list(bench._with_progress(calls, "cpu fp32"))
    assert "cpu fp32" in capsys.readouterr().err


def test_bench_without_pytorch_from_another_folder(tmp_path: Path) -> None:
    """Start the installed command in a folder that has a folder `edgeclip`."""
    (tmp_path / "edgeclip").mkdir()
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = "import sys; from edgeclip.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", f"import sys; sys.path.pop(0); {code}", "bench", *QUICK]
    command += ["--precision", "fp32", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": f"{Path(edgeclip.__file__).parents[1]}:{tmp_path}"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["measured"]) == 1
