"""As many threads as this process may use, in ONNX Runtime, in preparing and in the core."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import edgeclip
from edgeclip import _core
from edgeclip.backends.onnx_runtime import open_session
from edgeclip.cli.main import main
from tests.support.paths import EXAMPLES

BAG = str(EXAMPLES / "bag.png")

CLASSIFY = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
import edgeclip
from edgeclip import _core
rt = edgeclip.Runtime("garments", labels=["bag", "boot"])
assert len(list(rt.classify_each([sys.argv[2]] * 20))) == 20
allowed = {tuple(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
print(rt._threads, _core.usable_cores(), allowed)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_process_on_one_core_keeps_to_it() -> None:
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFY, str(core), BAG],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == f"1 1 {{({core},)}}\n", done.stderr
    assert done.stderr == ""  # no error of ONNX Runtime


@pytest.mark.parametrize("command", ["classify", "embed", "explain", "bench"])
def test_the_help_says_how_many_threads_are_used(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: all that affinity and CPU quota allow)" in text


@pytest.fixture
def restored() -> object:
    before = _core.usable_cores()
    yield
    _core.set_usable_cores(before)


@pytest.mark.usefixtures("restored")
def test_a_runtime_takes_the_cores_or_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.runtime.cores", lambda: 3)
    for asked, threads in ((None, 3), (1, 1), (5, 5)):
        runtime = edgeclip.Runtime("garments", threads=asked, precision="fp32")
        session = runtime._image_encoder._session
        assert session.get_session_options().intra_op_num_threads == threads
        assert _core.usable_cores() == 3


def test_a_session_never_chooses_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeclip.backends.onnx_runtime.cores", lambda: 2)
    session = open_session(edgeclip.Bundle("garments").encoder("image_encoder", "fp32"), "cpu")
    assert session.get_session_options().intra_op_num_threads == 2


@pytest.mark.usefixtures("restored")
def test_cores_of_the_core() -> None:
    assert 1 <= _core.usable_cores() <= (os.cpu_count() or 1)
    _core.set_usable_cores(7)
    assert _core.usable_cores() == 7
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="expected cores >= 1"):
            _core.set_usable_cores(wrong)
