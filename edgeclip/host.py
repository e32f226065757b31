"""Facts about this machine: usable cores, processor, GPU, and a Jetson's power mode and temperature.

They are read from Linux's files, or asked of NVIDIA's own tools where these are installed; a fact that
cannot be had is left out. `root` stands for `/` in the tests.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path("/")
# Instruction sets that decide which kernels ONNX Runtime and the core run, as /proc/cpuinfo spells them.
INSTRUCTIONS = (
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8",
    "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
PATIENCE = 10  # seconds for a tool to answer
BUSY = 0.5  # the load for each core from which a measurement is in doubt


def cores(root: Path = ROOT) -> int:
    """Return how many threads this process can keep running: the least of affinity and CPU quota.

    A quota (cgroup v1 or v2, as containers set it) of a fraction of a core counts as one core, and
    a fraction above a whole number is dropped: threads that spin would spend it waiting.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *map(int, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """Return the CPU quotas of this process's control groups and their parents, in cores."""
    quotas: list[float] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [controllers, "cpu"] if controllers else ["", "unified"]
        for mount in dict.fromkeys(mounts):
            top = root / "sys/fs/cgroup" / mount
            # In a container the path may be the host's, of which only the top can be seen.
            for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
                quotas += _quota(folder)
                if folder == top:
                    break
    return quotas


def _quota(folder: Path) -> list[float]:
    """Return the CPU quota that a control group sets, in cores, if it sets one."""
    if limit := _read(folder / "cpu.max"):
        quota, _, period = limit.partition(" ")
    else:
        quota = _read(folder / "cpu.cfs_quota_us")
        period = _read(folder / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):
        return [int(quota) / int(period)]
    return []  # "max", -1, or no such file


def processor(root: Path = ROOT) -> str:
    """Return the architecture, the processor's name and its instruction sets, in one line.

    Two machines with equal lines run the same kernels.
    """
    return " ".join([platform.machine(), cpu_name(root), *instructions(root)])


def cpu_name(root: Path = ROOT) -> str:
    """Return the processor's name, or the implementer and part of an ARM core."""
    info = root / "proc/cpuinfo"
    part = " ".join(filter(None, (_entry(info, "CPU implementer"), _entry(info, "CPU part"))))
    return _entry(info, "model name") or part or platform.machine()


def instructions(root: Path = ROOT) -> list[str]:
    """Return those of INSTRUCTIONS that the processor has."""
    info = root / "proc/cpuinfo"
    known = set((_entry(info, "flags") or _entry(info, "Features")).split())
    return [name for name in INSTRUCTIONS if name in known]


def vector_units(root: Path = ROOT) -> str:
    """Describe what speeds integer products up on x86-64, such as "AVX2, no VNNI"; "" elsewhere."""
    known = set(instructions(root))
    width = "AVX-512" if "avx512f" in known else "AVX2" if "avx2" in known else ""
    return width and f"{width}, {'VNNI' if known & VNNI else 'no VNNI'}"


def describe(root: Path = ROOT) -> dict[str, Any]:
    """Return the facts known here, in words; megabytes, megahertz and degrees Celsius."""
    facts = {
        "board": _read(root / "proc/device-tree/model").rstrip("\0"),
        "cpu": cpu_name(root),
        "instructions": vector_units(root),
        "cores": cores(root),
        "memory_mb": _megabytes(_entry(root / "proc/meminfo", "MemTotal")),
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "gpu": gpu(),
        "power_mode": " ".join(_said(["nvpmodel", "-q"]).split()),
        "gpu_clock_mhz": _gpu_clock(root),
        "temperature": temperature(root),
    }
    return {key: value for key, value in facts.items() if value not in ("", None)}


def memory_mb(root: Path = ROOT) -> dict[str, int]:
    """What this process has in memory, `resident`, and the most that it had, `peak`."""
    status = root / "proc/self/status"
    found = {
        name: _megabytes(_entry(status, key))
        for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))
    }
    return {name: value for name, value in found.items() if value is not None}


def trim_memory() -> None:
    """Return freed memory to the system, which glibc keeps; nothing with another C library."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def gpu() -> str:
    """Return the first GPU's name and its driver's version, "" where nvidia-smi does not know one."""
    return _nvidia_smi("name,driver_version")


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
    if load and float(load[0]) > BUSY * cores(root):
        return [f"the load is {load[0]} on {cores(root)} cores: other work slows this down"]
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
    """Return the value of the first line `name: value`, reading no further: cpuinfo may be long."""
    try:
        with open(path, errors="replace") as lines:
            for line in lines:
                key, colon, value = line.partition(":")
                if colon and key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return ""


def _megabytes(text: str) -> int | None:
    return round(int(text.split()[0]) / 1e3) if text else None


def _nvidia_smi(fields: str) -> str:
    lines = _said(["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"])
    return lines.partition("\n")[0].strip()


def _said(command: list[str]) -> str:
    """Return a tool's stdout, or "" if the tool is missing, fails or times out."""
    import shutil  # with subprocess 10 ms, which the start of a classification does not have
    import subprocess

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
