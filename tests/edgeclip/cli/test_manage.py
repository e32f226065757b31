"""Commands info, doctor and cache."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from edgeclip import _core
from edgeclip.text.cache import FILE
from tests.support.commands import BUNDLE, errors, run
from tests.support.paths import EXAMPLES

BAG = str(EXAMPLES / "bag.png")
LABELS = [*BUNDLE, "--labels", str(EXAMPLES / "labels.txt")]


def test_info_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", "garments", "--format", "table")
    assert status == 0
    assert "28 x 28" in out
    assert json.loads(run(capsys, "info", "garments")[1])["embedding"] == 128
    status, out, err = run(capsys, "doctor", "garments")
    assert status == 0, err
    report = json.loads(out)
    assert report["problem"] == ""
    assert report["device_used"]
    assert any(line.startswith("cpu int8: works") for line in report["devices"])
    if not _core.cuda_built():
        (why,) = (line for line in report["devices"] if line.startswith("tensorrt: not used: "))
        assert "needs edgeclip's CUDA kernels" in why
    assert any(line.startswith("onnxruntime ") for line in report["packages"])


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
    assert report == {"path": str(file), "labels": 10, "bytes": size, "limit_bytes": 1 << 28}
    assert (share["labels"], share["bytes"]) == (10, 10 * 128 * 4)
    assert "int8" in share["encoder"]
    assert "labels 10, bytes 5120" in run(capsys, "cache", "--format", "table")[1]
    status, out, _ = run(capsys, "cache", "--clear")
    report = json.loads(out)
    assert report.pop("freed_bytes") > size  # with the trials of precisions
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
