"""Systemd unit of docs/jetson.md: it parses, and the command that it starts exists and parses."""

from __future__ import annotations

import argparse
import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import camera
from tests.support.paths import EXAMPLES

UNIT = EXAMPLES / "edgeclip-camera.service"


@pytest.fixture
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # its keys have capitals
    parser.read(UNIT)
    return parser


def test_it_starts_the_camera_example(
    unit: configparser.ConfigParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, script, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert Path(python).is_absolute()
    assert (EXAMPLES.parent / Path(script).relative_to("/opt/edgeclip")).is_file()
    parsed = []

    def parse(parser: argparse.ArgumentParser, given: list[str]) -> argparse.Namespace:
        parsed.append(original(parser, given))
        return parsed[-1]

    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert camera.main(arguments) == 2  # OpenCV is missing, found after parsing
    assert parsed[0].label == ["a person", "an empty room"]


def test_it_keeps_its_cache_and_its_rights_small(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    name, _, folder = service["Environment"].partition("=")
    assert (name, folder) == ("EDGECLIP_CACHE", f"/var/cache/{service['CacheDirectory']}")
    assert service["User"] == "edgeclip"
    assert {"video", "render"} <= set(service["SupplementaryGroups"].split())
    assert service["Restart"] == "always"  # also after a camera was unplugged
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "yes"
    # These would hide the GPU, or the socket of a CSI camera.
    assert not {"PrivateDevices", "DynamicUser", "PrivateTmp"} & set(service)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/opt/edgeclip/venv/bin/python", sys.executable)
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert ours == []
    assert done.returncode == 0
