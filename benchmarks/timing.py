"""Timing of competitors in one run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeclip import host, storage
from edgeclip.json_output import to_json

ROUNDS = 4
WARM_UP = 3

# A process of its own, since a child's peak memory is never below that of the process it was
# started from.
LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(json.loads(sys.argv[1]), capture_output=True, text=True)
seconds = time.perf_counter() - start
if done.returncode:
    sys.exit(done.stderr)
print(1e3 * seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)
"""


def medians_ms(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, float]:
    """The median time of each call in milliseconds; see samples_ms."""
    found = samples_ms(calls, repeats, rounds, warm_up)
    return {name: statistics.median(times) for name, times in found.items()}


def samples_ms(
    calls: dict[str, Callable[[], object]],
    repeats: int,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """The times of each call in milliseconds.

    The competitors take turns in rounds, so that both meet the same machine; within a round each
    runs alone after a warm-up, since the threads of one library spin for a while after its call
    and would slow the other down.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(warm_up):
                call()
            for _ in range(-(-repeats // rounds)):
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def process(command: Sequence[str], repeats: int) -> tuple[float, float]:
    """Median wall time in milliseconds and largest peak memory in MB of a whole process.

    Raises RuntimeError with its stderr where it fails.
    """
    times, peaks = [], []
    for _ in range(repeats):
        launcher = [sys.executable, "-S", "-c", LAUNCHER, json.dumps(list(command))]
        done = subprocess.run(launcher, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
        elapsed, peak = map(float, done.stdout.split())
        times.append(elapsed)
        peaks.append(peak)
    return statistics.median(times), max(peaks)


def machine() -> str:
    """Return the processor, its vector units, and the number of its cores that this process may use."""
    facts = [host.cpu_name(), host.vector_units(), f"{host.cores()} cores"]
    return ", ".join(filter(None, facts))


def publish(
    report: dict[str, Any], render: Callable[[dict[str, Any]], str], out: Path | None
) -> None:
    """Print a report, and write it to `out` as JSON where that is asked for."""
    print(f"{headline(report)}\n\n{render(report)}", flush=True)
    if out is not None:
        storage.write(out, to_json(report, indent=2) + "\n")


def headline(report: dict[str, Any]) -> str:
    """What was measured, on which machine, by which versions."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    model = f"{report['model']}; " if "model" in report else ""
    return f"{model}{report['machine']}; {versions}."
