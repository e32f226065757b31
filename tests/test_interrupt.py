"""Ctrl-C ends every command with status 130, and without a traceback."""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import BUNDLE, errors
from tests.support.paths import EXAMPLES, GARMENTS, ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("benchmarks", "edgeclip", "export", "train")
    for path in (ROOT / package).rglob("*.py")
    if path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text("utf-8")
)


def test_commands_are_found() -> None:
    assert {"benchmarks.core", "edgeclip", "export", "export.fused", "train.data"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_an_interrupted_command_ends_with_130(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", interrupt)
    # runpy warns of a module that is loaded. A package stays: its parent refers to it.
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    loaded = f"{module}.__main__" if is_package else module
    monkeypatch.delitem(sys.modules, loaded, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def open_once_read(pipe: Path, process: subprocess.Popen[str]) -> int:
    """Open a named pipe for writing once the process has opened it for reading."""
    while process.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    return pytest.fail(f"the command ended: {process.communicate()}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["edgeclip", "classify", str(EXAMPLES / "bag.png"), *BUNDLE, "--labels"],
        ["export.fused", str(GARMENTS), "-o", "classes.npy", "--classes-for"],
        ["train.report"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_signal_ends_a_command_at_work(arguments: list[str], tmp_path: Path) -> None:
    """Interrupt a command while it reads its last argument, a pipe that gives nothing."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", *arguments, str(pipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        writer = open_once_read(pipe, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        os.close(writer)
    assert process.returncode == 130
    assert errors(stderr) == ["interrupted"]
