"""What this runs on, read from a folder that stands for `/`, and from NVIDIA's tools."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeclip import machine
from edgeclip.pipeline import cores


def write(root: Path, entries: dict[str, str]) -> None:
    for name, text in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files and tools as JetPack 6 has them."""
    zone = "sys/class/thermal/thermal_zone"
    entries = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd42\n",
        "proc/meminfo": "MemTotal:        7802844 kB\nMemFree:  100 kB\n",
        "proc/loadavg": "0.01 0.20 0.30 1/200 4242\n",
        "proc/self/status": "Name:\tpython\nVmHWM:\t  200000 kB\nVmRSS:\t  100000 kB\n",
        f"{zone}0/type": "cpu-thermal\n",
        f"{zone}0/temp": "51250\n",
        f"{zone}0/trip_point_0_type": "passive\n",
        f"{zone}0/trip_point_0_temp": "99000\n",
        f"{zone}1/type": "gpu-thermal\n",
        f"{zone}1/temp": "52500\n",
        f"{zone}1/trip_point_0_type": "critical\n",
        f"{zone}1/trip_point_0_temp": "1000\n",
        f"{zone}2/type": "cv0-thermal\n",  # some have no temperature
        "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
        "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    }
    write(tmp_path, entries)
    tools = tmp_path / "usr/bin"
    tools.mkdir(parents=True)
    tool(tools, "nvpmodel", "echo 'NV Power Mode: 25W'; echo 1")
    tool(tools, "nvidia-smi", "echo 'Orin (nvgpu), 540.4.0'")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_a_jetson_is_described(jetson: Path) -> None:
    told = machine.describe(jetson)
    assert told["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert told["memory MB"] == 7803
    assert told["power mode"] == "NV Power Mode: 25W 1"
    assert told["gpu"] == "Orin (nvgpu), 540.4.0"
    assert told["gpu clock MHz"] == "918, from 306 to 1020"
    assert told["temperature"] == 52.5
    assert machine.hot(jetson) == []
    assert machine.busy(jetson) == []
    assert machine.memory_mb(jetson) == {"resident": 100, "peak": 200}


def test_locked_clocks_heat_and_load_are_told(jetson: Path) -> None:
    write(
        jetson,
        {
            "sys/class/devfreq/17000000.gpu/min_freq": "1020000000\n",
            "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000\n",
            "sys/class/thermal/thermal_zone0/temp": "99500\n",
            "proc/loadavg": f"{cores()}.00 0.20 0.30 1/200 4242\n",
        },
    )
    assert machine.describe(jetson)["gpu clock MHz"] == "1020, locked"
    assert machine.hot(jetson) == ["cpu-thermal is at 99.5 degrees, and slows down from 99"]
    (told,) = machine.busy(jetson)
    assert f"{cores()}.00 on {cores()} cores" in told


def test_what_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe(tmp_path).keys() == {"cpu", "cores", "system"}
    assert machine.memory_mb(tmp_path) == {}
    assert machine.hot(tmp_path) == machine.busy(tmp_path) == []
    assert machine.gpu_memory_mb() is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '1234 MiB'; echo '5 MiB'", 1234.0),
        ("echo '[N/A]'", None),  # a Jetson
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
    ],
)
def test_memory_of_the_gpu(
    script: str, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert machine.gpu_memory_mb() == expected


def test_a_tool_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvpmodel", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "PATIENCE", 0.1)
    assert "power mode" not in machine.describe(tmp_path)


def test_this_machine() -> None:
    told = machine.describe()
    assert told["cores"] == len(os.sched_getaffinity(0))
    assert (
        abs(told["memory MB"] - os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024e3)
        < 2
    )
    memory = machine.memory_mb()
    assert 10 < memory["resident"] <= memory["peak"]
