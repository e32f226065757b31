"""Machine facts, read from a folder that replaces `/` and from imitations of NVIDIA's tools."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeclip import host
from edgeclip.host import cores


def write(root: Path, entries: dict[str, str]) -> None:
    for name, text in entries.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the files and tools of JetPack 6."""
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
    told = host.describe(jetson)
    assert told["board"] == "NVIDIA Jetson Orin Nano Developer Kit"
    assert told["memory_mb"] == 7803
    assert told["power_mode"] == "NV Power Mode: 25W 1"
    assert told["gpu"] == "Orin (nvgpu), 540.4.0"
    assert told["gpu_clock_mhz"] == "918, from 306 to 1020"
    assert told["temperature"] == 52.5
    assert host.hot(jetson) == []
    assert host.busy(jetson) == []
    assert host.memory_mb(jetson) == {"resident": 100, "peak": 200}


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
    assert host.describe(jetson)["gpu_clock_mhz"] == "1020, locked"
    assert host.hot(jetson) == ["cpu-thermal is at 99.5 degrees, and slows down from 99"]
    (told,) = host.busy(jetson)
    assert f"{cores()}.00 on {cores()} cores" in told


def test_what_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.describe(tmp_path).keys() == {"cpu", "cores", "system"}
    assert host.memory_mb(tmp_path) == {}
    assert host.hot(tmp_path) == host.busy(tmp_path) == []
    assert host.gpu_memory_mb() is None


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
    assert host.gpu_memory_mb() == expected


def test_a_tool_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvpmodel", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(host, "TOOL_TIMEOUT", 0.1)
    assert "power_mode" not in host.describe(tmp_path)


def test_this_machine() -> None:
    told = host.describe()
    assert 1 <= told["cores"] <= len(os.sched_getaffinity(0))
    assert (
        abs(told["memory_mb"] - os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024e3)
        < 2
    )
    memory = host.memory_mb()
    assert 10 < memory["resident"] <= memory["peak"]


def quota(root: Path, group: str, files: dict[str, str]) -> Path:
    """Files of a process in the control group `group`, as /proc/self/cgroup names it."""
    write(root, {"proc/self/cgroup": f"{group}\n", **files})
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),  # the parent's
        (
            "0::/a/b",
            {
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/cpu.max": "600000 100000\n",
            },
            2,
        ),
        ("0::/of/the/host", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),  # a container
        (
            "4:cpu,cpuacct:/docker/1",
            {f"{V1}/cpu.cfs_quota_us": "250000\n", f"{V1}/cpu.cfs_period_us": "50000\n"},
            5,
        ),
        (
            "4:cpu,cpuacct:/a",
            {f"{V1}/a/cpu.cfs_quota_us": "-1\n", f"{V1}/a/cpu.cfs_period_us": "100000\n"},
            8,
        ),
        ("5:memory:/a", {"sys/fs/cgroup/memory/a/cpu.max": "100000 100000\n"}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "100000 0"}, 8),
        ("", {}, 8),
    ],
)
def test_a_quota_of_the_control_group_limits_the_cores(
    group: str,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cores(quota(tmp_path, group, files)) == expected


def test_the_affinity_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    root = quota(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert cores(root) == 1


INTEL = """processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 6230
flags\t\t: fpu sse2 avx avx2 fma constant_tsc avx512f avx512_vnni

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("cpuinfo", "name", "instructions", "units"),
    [
        (
            INTEL,
            "Intel(R) Xeon(R) Gold 6230",
            ["avx", "avx2", "fma", "avx512f", "avx512_vnni"],
            "AVX-512, VNNI",
        ),
        (
            "model name\t: AMD EPYC\nflags\t: avx2 fma\n",
            "AMD EPYC",
            ["avx2", "fma"],
            "AVX2, no VNNI",
        ),
        (
            "model name\t: N100\nflags\t: avx2 avx_vnni\n",
            "N100",
            ["avx2", "avx_vnni"],
            "AVX2, VNNI",
        ),
        (
            "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
            "0x41 0xd42",
            ["asimd", "asimddp"],
            "",
        ),
    ],
)
def test_the_processor_is_named_with_its_instructions(
    cpuinfo: str, name: str, instructions: list[str], units: str, tmp_path: Path
) -> None:
    write(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert host.cpu_name(tmp_path) == name
    assert host.instructions(tmp_path) == instructions
    assert host.vector_units(tmp_path) == units
    assert host.processor(tmp_path).endswith(" ".join([name, *instructions]))
