"""Packages of other extras, without which `python -m export` runs or fails in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("torch",), "exporting needs pip install 'edgeclip[export]'"),
        (("matplotlib", "scipy", "tensorboard", "torchattacks"), "error: unknown model 'no-such'"),
    ],
)
def test_missing_packages(missing: tuple[str, ...], message: str) -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "from export.__main__ import main; sys.exit(main(['no-such', '-o', 'no-such']))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2, process.stderr
    assert message in process.stderr
    assert "Traceback" not in process.stderr
