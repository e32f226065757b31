"""Evaluations that are interrupted, resumed, extended or split over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models.export_models import write_folder
from tests.support.paths import ROOT
from tests.support.robustness.evaluation import SMALL, command, marks, run, without_seconds
from train import evaluate
from train.errors import SettingsError
from train.evaluate import build_parser
from train.robustness.checks import CHECKS
from train.robustness.measurement import Measurement


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "subject", "vit", **SMALL)


@pytest.fixture
def arguments(subject: Path, fashion_folder: Path, tmp_path: Path) -> list[str]:
    return command(subject, fashion_folder, tmp_path / "result.json")


def test_killed_evaluation_resumes(arguments: list[str]) -> None:
    """Kill a run between two writes; finished marks are not computed again."""
    attacks = ["--attack", "apgd-ce", "pgd", "--steps", "20", "--threads", "1"]
    out = Path(arguments[-1])
    child = subprocess.Popen(
        [sys.executable, "-m", "train.evaluate", *arguments, *attacks], stderr=subprocess.PIPE,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        if out.is_file() and 0 < json.loads(out.read_text()).get("finished", 0) < 40:
            break
        time.sleep(0.01)
    child.kill()
    assert child.stderr is not None
    child.stderr.close()
    child.wait()
    half = json.loads(out.read_text())
    assert 0 < half["finished"] < 40
    # Marks in the file are kept, not computed again, even wrong ones.
    changed = half | {"samples": half["samples"] | {"clean": "0" + half["samples"]["clean"][1:]}}
    changed["samples"]["pgd/exact"] = "1" + half["samples"]["pgd/exact"][1:]
    out.write_text(json.dumps(changed))
    again = run(arguments, *attacks)
    out.unlink()
    whole = run(arguments, *attacks)
    for key in whole["samples"]:
        assert again["samples"][key][1:] == whole["samples"][key][1:]
    assert (again["samples"]["clean"][0], again["samples"]["pgd/exact"][0]) == ("0", "1")


def test_more_images_are_added_to_a_result(arguments: list[str]) -> None:
    first = run(arguments, "-n", "16")
    more = run(arguments)
    assert more["samples"]["clean"][:16] == first["samples"]["clean"]
    Path(arguments[-1]).unlink()
    assert without_seconds(run(arguments)) == without_seconds(more)
    with pytest.raises(SettingsError, match=r"other settings \(samples\)"):
        run(arguments, "-n", "16")


def test_partial_batch_is_attacked_again(arguments: list[str]) -> None:
    first = run(arguments, "-n", "24")  # 16 and 8
    changed = json.loads(json.dumps(first))
    changed["samples"] = dict.fromkeys(first["samples"], "1" * 24)
    Path(arguments[-1]).write_text(json.dumps(changed))
    more = run(arguments)
    Path(arguments[-1]).unlink()
    whole = run(arguments)
    for key in whole["samples"]:
        assert more["samples"][key] == "1" * 16 + whole["samples"][key][16:]


def test_partial_figures_are_over_finished_images(arguments: list[str]) -> None:
    whole = run(arguments, "--attack", "pgd")
    half = json.loads(json.dumps(whole))
    half["samples"]["pgd/exact"] = whole["samples"]["pgd/exact"][:16] + "?" * 24
    work = Measurement(checked(arguments, "--attack", "pgd"), 0, 1, torch.device("cpu"))
    Path(arguments[-1]).write_text(json.dumps(half))
    work.resume()
    result = work.recorder.result().to_dict()
    assert result["finished"] == 16
    assert result["clean_accuracy"] == pytest.approx(marks(whole, "clean")[0, :16].mean())
    assert result["worst_case_accuracy"] == pytest.approx(marks(whole)[:, :16].all(0).mean())


def checked(arguments: list[str], *more: str) -> Any:
    args = build_parser().parse_args([*arguments, *more])
    evaluate.check(args)
    return args


def test_two_processes_equal_one(arguments: list[str]) -> None:
    attacks = ["--attack", "autoattack", "cw", "--purify", "cos", "--check-samples", "8"]
    one = run(arguments, *attacks)
    out = Path(arguments[-1])
    out.unlink()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "train.evaluate", *arguments, *attacks, "--threads", "1"], check=True,
        capture_output=True, timeout=240, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert without_seconds(json.loads(out.read_text())) == without_seconds(one)
    assert list(out.parent.glob("result.json.*")) == []


def test_files_of_several_processes_are_merged(arguments: list[str]) -> None:
    whole = run(arguments, "--attack", "pgd")
    out = Path(arguments[-1])
    for rank, indices in enumerate((range(16), range(16, 32))):
        part = json.loads(json.dumps(whole))
        part["samples"] = {
            key: "".join(mark if i in indices else "?" for i, mark in enumerate(row))
            for key, row in whole["samples"].items()
        }
        part["seconds"] = dict.fromkeys(whole["samples"], 5.0)
        name = f"{out.name}.rank{rank}" if rank else out.name
        out.with_name(name).write_text(json.dumps(part))
    again = run(arguments, "--attack", "pgd")
    assert without_seconds(again) == without_seconds(whole)
    assert again["seconds"]["pgd/exact"] >= 10
    assert list(out.parent.glob("result.json.*")) == []


def test_ten_checks_are_run_and_stored(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*arguments, "--check-samples", "12", "--attack", "pgd", "--purify", "cos"]
    result = run(arguments)
    assert [row["name"] for row in result["checks"]] == list(CHECKS)
    assert len(CHECKS) == 10
    assert all(row["passed"] in (True, False, None) and row["figure"] for row in result["checks"])
    failed = [str(i) for i, row in enumerate(result["checks"], 1) if row["passed"] is False]
    printed = capsys.readouterr().out
    warning = f"DO NOT TRUST THESE FIGURES: checks {', '.join(failed)} FAILED"
    assert (warning in printed) == bool(failed)
    out = Path(arguments[arguments.index("--out") + 1])
    changed = result | {"checks": [result["checks"][0] | {"figure": "kept"}]}
    out.write_text(json.dumps(changed))
    again = run(arguments)["checks"]
    assert again[0]["figure"] == "kept"
    assert again[1:] == result["checks"][1:]


def test_results_of_other_settings_are_not_mixed(arguments: list[str]) -> None:
    run(arguments, "--attack", "pgd")
    with pytest.raises(SettingsError, match=r"other settings \(eps, attack, step_size\)"):
        run(arguments, "--attack", "pgd", "cw", "--eps", "8/255")
    result = json.loads(Path(arguments[-1]).read_text())
    for text in ("{}", "[", json.dumps(result | {"samples": {"nothing": "1"}})):
        Path(arguments[-1]).write_text(text)
        with pytest.raises(
            SettingsError, match=r"is no result of python -m train\.evaluate: .*: remove the file"
        ):
            run(arguments, "--attack", "pgd")
