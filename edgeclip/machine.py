"""What this runs on: processor, GPU, and on a Jetson what its power mode and temperature are.

Everything is read from files of Linux, or asked of NVIDIA's own tools where they are installed; what is
not there is left out. `root` stands for `/` in the tests.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from edgeclip.pipeline import cores

ROOT = Path("/")
PATIENCE = 10  # seconds for a tool to answer
BUSY = 0.5  # the load for each core from which a measurement is in doubt


def describe(root: Path = ROOT) -> dict[str, Any]:
    """The entries that are known here, in words; megabytes, megahertz and degrees Celsius."""
    told = {
        "board": _read(root / "proc/device-tree/model").rstrip("\0"),
        "cpu": _entry(root / "proc/cpuinfo", "model name") or platform.machine(),
        "cores": cores(),
        "memory MB": _megabytes(_entry(root / "proc/meminfo", "MemTotal")),
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "gpu": _nvidia_smi("name,driver_version"),
        "power mode": " ".join(_said(["nvpmodel", "-q"]).split()),
        "gpu clock MHz": _gpu_clock(root),
        "temperature": temperature(root),
    }
    return {key: value for key, value in told.items() if value not in ("", None)}


def memory_mb(root: Path = ROOT) -> dict[str, int]:
    """What this process has in memory, `resident`, and the most that it had, `peak`."""
    status = root / "proc/self/status"
    found = {
        name: _megabytes(_entry(status, key))
        for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))
    }
    return {name: value for name, value in found.items() if value is not None}


def gpu_memory_mb() -> float | None:
    """What all processes together use of the first GPU. None on a Jetson: its memory is the CPU's."""
    used = _nvidia_smi("memory.used")
    return float(used.split()[0]) if used[:1].isdecimal() else None


def temperature(root: Path = ROOT) -> float | None:
    """Of the hottest zone."""
    found = [_degrees(zone / "temp") for zone in _zones(root)]
    return max((value for value in found if value is not None), default=None)


def hot(root: Path = ROOT) -> list[str]:
    """The zones that are so hot that the machine slows itself down, each as a warning."""
    found = []
    for zone in _zones(root):
        now = _degrees(zone / "temp")
        trips = [
            degrees
            for kind in zone.glob("trip_point_*_type")
            if _read(kind) == "passive"
            and (degrees := _degrees(kind.with_name(kind.name.replace("type", "temp")))) is not None
        ]
        if now is not None and trips and now >= min(trips):
            name = _read(zone / "type")
            found.append(f"{name} is at {now:g} degrees, and slows down from {min(trips):g}")
    return found


def busy(root: Path = ROOT) -> list[str]:
    """A warning where other work takes the time that is to be measured."""
    load = _read(root / "proc/loadavg").split()
    if load and float(load[0]) > BUSY * cores():
        return [f"the load is {load[0]} on {cores()} cores: other work slows this down"]
    return []


def _gpu_clock(root: Path) -> str:
    """As `jetson_clocks` locks it, with the range where it does not. A Jetson's only."""
    for folder in sorted(root.glob("sys/class/devfreq/*")):
        if "gpu" in folder.name or folder.name.endswith((".gv11b", ".ga10b")):
            hertz = [_read(folder / f"{name}_freq") for name in ("min", "cur", "max")]
            if all(text.isdecimal() for text in hertz):
                low, now, high = (int(text) // 1_000_000 for text in hertz)
                return f"{now}, locked" if low == high else f"{now}, from {low} to {high}"
    return ""


def _zones(root: Path) -> list[Path]:
    return sorted(root.glob("sys/class/thermal/thermal_zone*"))


def _degrees(path: Path) -> float | None:
    text = _read(path)
    return int(text) / 1000 if text.lstrip("-").isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # some zones of a Jetson refuse to be read
        return ""


def _entry(path: Path, name: str) -> str:
    """The value of the first line `name: value`."""
    for line in _read(path).splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _megabytes(text: str) -> int | None:
    return round(int(text.split()[0]) / 1e3) if text else None


def _nvidia_smi(fields: str) -> str:
    lines = _said(["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"])
    return lines.partition("\n")[0].strip()


def _said(command: list[str]) -> str:
    """What a tool printed; nothing where it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
