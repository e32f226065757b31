"""`python -m export.diffusion_prior`: output, refusals and threads."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from export.diffusion_prior import main
from tests.support.models.prior_models import write_prior


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "a.safetensors", depth=1, heads=1)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]


def test_command_prints_the_parity(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("export.diffusion_prior.export_step", lambda *_: None)
    monkeypatch.setattr(
        "export.diffusion_prior.verify_step", lambda *_: {"loss_max_rel_diff": 1e-6}
    )
    assert main([str(weights), "-o", str(tmp_path / "a.onnx")]) == 0
    assert "loss_max_rel_diff        1e-06" in capsys.readouterr().out
    assert main([str(weights), "-o", str(tmp_path / "a.onnx"), "--text-length", "0"]) == 2
    assert last_line(capsys) == "error: --text-length must be 1 or more, got 0"


def test_command_destroys_nothing(
    weights: Path,
    tmp_path: Path,
    devices: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    def export(_: object, path: Path, *__: object) -> None:
        path.write_text("graph")

    monkeypatch.setattr("export.diffusion_prior.export_step", export)
    monkeypatch.setattr("export.diffusion_prior.verify_step", lambda *_: {})
    run = Path(shutil.copytree(weights.parent, tmp_path / "run"))
    (run / "prior.safetensors").write_bytes(weights.read_bytes())
    for source in (run / weights.name, run):
        file = source if source.is_file() else run / "prior.safetensors"
        assert main([str(source), "-o", str(file), "--force"]) == 2
        assert "that would destroy the input" in last_line(capsys)
        assert file.read_bytes() == weights.read_bytes()
    assert main([str(weights), "-o", str(devices["null"])]) == 0
    assert stat.S_ISCHR(devices["null"].stat().st_mode)
    (tmp_path / "link").symlink_to("target")
    assert main([str(weights), "-o", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "graph"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link", "target"}


def test_comparison_runs_on_the_usable_cores(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Override ONNX Runtime's default, which pins threads to all of the machine's cores."""
    threads: list[int] = []
    create = ort.InferenceSession

    def recorded(*arguments: Any, **options: Any) -> ort.InferenceSession:
        session = create(*arguments, **options)
        threads.append(session.get_session_options().intra_op_num_threads)
        return session

    monkeypatch.setattr(ort, "InferenceSession", recorded)
    monkeypatch.setattr("edgeclip.backends.onnx_runtime.cores", lambda: 2)
    arguments = ["--gradient", "forward", "--text-length", "2"]
    assert main([str(weights), "-o", str(tmp_path / "prior.onnx"), *arguments]) == 0
    assert threads == [2]
