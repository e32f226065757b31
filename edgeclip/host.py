"""Facts about this machine: usable cores, processor, GPU, and a Jetson's power mode and temperature.

They come from Linux's files and, if installed, NVIDIA's tools; an unknown fact is left out. The files
are read directly: psutil has neither the quotas of control groups nor instruction sets nor boards.
`root` replaces `/` in tests.
"""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path("/")
# Instruction sets that select kernels of ONNX Runtime and the core, as spelled in /proc/cpuinfo.
INSTRUCTIONS = (
    "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8",
    "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
TOOL_TIMEOUT = 10  # seconds
BUSY = 0.5  # load per core above which a measurement is in doubt


def cores(root: Path = ROOT) -> int:
    """Return how many threads this process can keep running: the minimum of affinity and CPU quota.

    A quota (cgroup v1 or v2, as containers set it) is rounded down, to at least one core: spinning
    threads would waste a fraction of a core.
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
            # In a container the path may be the host's, and only the top folder exists here.
            for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
                quotas += _quota(folder)
                if folder == top:
                    break
    return quotas


def _quota(folder: Path) -> list[float]:
    """Return the CPU quota of a control group, in cores; empty if it has none."""
    if limit := _read(folder / "cpu.max"):
        quota, _, period = limit.partition(" ")
    else:
        quota = _read(folder / "cpu.cfs_quota_us")
        period = _read(folder / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):
        return [int(quota) / int(period)]
    return []  # "max", -1, or no such file


def processor(root: Path = ROOT) -> str:
    """Return the architecture, the processor's name and its instruction sets in one line.

    Machines with equal lines run the same kernels.
    """
    return " ".join([platform.machine(), cpu_name(root), *instructions(root)])


def cpu_name(root: Path = ROOT) -> str:
    """Return the processor's name, or the implementer and part of an ARM core."""
    info = root / "proc/cpuinfo"
    part = " ".join(filter(None, (_entry(info, "CPU implementer"), _entry(info, "CPU part"))))
    return _entry(info, "model name") or part or platform.machine()


def instructions(root: Path = ROOT) -> list[str]:
    """Return the processor's instruction sets, in the order of INSTRUCTIONS."""
    info = root / "proc/cpuinfo"
    known = set((_entry(info, "flags") or _entry(info, "Features")).split())
    return [name for name in INSTRUCTIONS if name in known]


def vector_units(root: Path = ROOT) -> str:
    """Name the x86-64 instructions for integer products, such as "AVX2, no VNNI"; "" elsewhere."""
    known = set(instructions(root))
    width = "AVX-512" if "avx512f" in known else "AVX2" if "avx2" in known else ""
    return width and f"{width}, {'VNNI' if known & VNNI else 'no VNNI'}"


def describe(root: Path = ROOT) -> dict[str, Any]:
    """Return all known facts by name; units are megabytes, megahertz and degrees Celsius."""
    facts = {
        "board": _read(root / "proc/device-tree/model").rstrip("\0"),
        "cpu": cpu_name(root),
        "instructions": vector_units(root),
        "cores": cores(root),
        "memory_mb": _megabytes(_entry(root / "proc/meminfo", "MemTotal")),
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "gpu": gpu(),
        "power_mode": " ".join(_tool_output(["nvpmodel", "-q"]).split()),
        "gpu_clock_mhz": _gpu_clock(root),
        "temperature": temperature(root),
    }
    return {key: value for key, value in facts.items() if value not in ("", None)}


def memory_mb(root: Path = ROOT) -> dict[str, int]:
    """Return the `resident` and `peak` memory of this process, in megabytes."""
    status = root / "proc/self/status"
    sizes = {
        name: _megabytes(_entry(status, key))
        for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))
    }
    return {name: size for name, size in sizes.items() if size is not None}


def trim_memory() -> None:
    """Return freed memory to the system, which glibc keeps; does nothing with another C library."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def gpu() -> str:
    """Return the first GPU's name and driver version; "" if nvidia-smi finds none."""
    return _nvidia_smi("name,driver_version")


def gpu_memory_mb() -> float | None:
    """Return the first GPU's memory used by all processes; None on a Jetson, which shares the CPU's."""
    used = _nvidia_smi("memory.used")
    return float(used.split()[0]) if used[:1].isdecimal() else None


def temperature(root: Path = ROOT) -> float | None:
    """Return the temperature of the hottest zone, in degrees Celsius; None if unknown."""
    temperatures = [_degrees(zone / "temp") for zone in _zones(root)]
    return max((degrees for degrees in temperatures if degrees is not None), default=None)


def hot(root: Path = ROOT) -> list[str]:
    """Return a warning for each zone that is hot enough for the machine to slow down."""
    warnings = []
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
            warnings.append(f"{name} is at {now:g} degrees, and slows down from {min(trips):g}")
    return warnings


def busy(root: Path = ROOT) -> list[str]:
    """Return a warning if other work would slow a measurement down."""
    load = _read(root / "proc/loadavg").split()
    if load and float(load[0]) > BUSY * cores(root):
        return [f"the load is {load[0]} on {cores(root)} cores: other work slows this down"]
    return []


def _gpu_clock(root: Path) -> str:
    """Return the clock of a Jetson's GPU: locked (by jetson_clocks), or with its range."""
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
    except OSError:  # a missing file, or an unreadable zone of a Jetson
        return ""


def _entry(path: Path, name: str) -> str:
    """Return the value of the first line `name: value`. Reads no further: cpuinfo may be long."""
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
    lines = _tool_output(
        ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    )
    return lines.partition("\n")[0].strip()


def _tool_output(command: list[str]) -> str:
    """Return a tool's stdout, or "" if the tool is missing, fails or times out."""
    import shutil  # here: with subprocess it takes 10 ms, which would delay every start
    import subprocess

    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT,
            env=os.environ | {"LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
