"""Measuring: calls that take turns, and a child process with its peak memory."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

__all__ = ["in_turns", "machine", "peak_memory", "run_child"]

# How often a child looks at its own memory.
_SAMPLE = 0.005  # seconds


def machine(threads: int) -> dict[str, Any]:
    """What the results were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "onnxruntime": ort.__version__,
    }


def in_turns(calls: Mapping[str, Callable[[int], object]], *, turns: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that a slow moment of the machine hits all of them.

    Before a call is timed it is made once: the threads of the session that ran before spin on for a while,
    and would slow it by half.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + warm_up):
        for name, call in calls.items():
            call(2 * turn)
            start = time.perf_counter()
            call(2 * turn + 1)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run_child(step: str, *arguments: str | Path) -> dict[str, Any]:
    """Run `benchmarks.steps` in a process of its own; gives what it printed: seconds and memory."""
    command = [sys.executable, "-m", "benchmarks.steps", step, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{step} failed:\n{result.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


def peak_memory(work: Callable[[], object]) -> dict[str, float]:
    """Seconds that `work` takes, and how far memory grows meanwhile, in MB.

    `anonymous` is what the process needs; `resident` counts pages of mapped files too, which the system
    takes back when it wants them.
    """
    peaks = {"RssAnon": 0.0, "VmRSS": 0.0}
    before = _memory()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE):
            for name, value in _memory().items():
                peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "anonymous_mb": max(0.0, peaks["RssAnon"] - before["RssAnon"]),
        "resident_mb": max(0.0, peaks["VmRSS"] - before["VmRSS"]),
    }


def _memory() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) / 1000 for name in ("RssAnon", "VmRSS")}
