"""Timing of calls and processes that take turns in one run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeclip import host, storage
from edgeclip.json_output import to_json

ROUNDS = 4
WARM_UP = 3

# A process of its own: the peak memory of a child is never below that of its parent.
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
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, float]:
    """Return the median time of each call in milliseconds; see samples_ms."""
    samples = samples_ms(calls, repeats, rounds, warm_up)
    return {name: statistics.median(times) for name, times in samples.items()}


def samples_ms(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    rounds: int = ROUNDS,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Return the times of each call in milliseconds.

    Calls take turns in rounds, so that all meet the same state of the machine. In a round each call
    repeats alone after a warm-up: the threads of one library spin for a while after a call and would
    slow the next one.
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
    """Return the median wall time in ms and the largest peak memory in MB of a process.

    Raises RuntimeError with the stderr of a process that fails.
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
    """Return the processor, its vector units and the number of usable cores."""
    facts = [host.cpu_name(), host.vector_units(), f"{host.cores()} cores"]
    return ", ".join(filter(None, facts))


def publish(
    report: dict[str, Any], render: Callable[[dict[str, Any]], str], out: Path | None
) -> None:
    """Print a report, and write it as JSON to `out` unless that is None."""
    print(f"{headline(report)}\n\n{render(report)}", flush=True)
    if out is not None:
        storage.write(out, to_json(report, indent=2) + "\n")


def headline(report: dict[str, Any]) -> str:
    """Return the model, the machine and the versions of a report."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    model = f"{report['model']}; " if "model" in report else ""
    return f"{model}{report['machine']}; {versions}."
