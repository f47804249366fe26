"""Interleaved timing: every provider runs once a round, so that a slow moment of the machine hits all of them. The
order is drawn anew each round: who runs before leaves its caches and its heap behind."""

import datetime
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """Median and the middle 80 % of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: list[float]) -> "Spread":
        ordered = sorted(sample)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def interleaved(
    providers: Mapping[str, Callable[[], object]], seconds: float = 2.0, at_least: int = 7, at_most: int = 60
) -> dict[str, list[float]]:
    """Milliseconds of each provider, one number a round; a number averages enough calls to take about 2 ms."""
    calls = {}
    for name, run in providers.items():
        run()
        calls[name] = max(1, int(0.002 / max(_time(run, 1), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in providers}
    names, start = list(providers), time.perf_counter()
    order = random.Random(0)
    for round_number in range(at_most):
        if round_number >= at_least and time.perf_counter() - start > seconds:
            break
        for name in order.sample(names, len(names)):
            times[name].append(1e3 * _time(providers[name], calls[name]))
    return times


def _time(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def speedup(times: dict[str, list[float]], ours: str, theirs: str) -> Spread:
    """How many times faster ours is, from the ratios within each round."""
    return Spread.of([b / a for a, b in zip(times[ours], times[theirs], strict=True)])


def fastest(times: dict[str, list[float]], prefix: str) -> str:
    return min((name for name in times if name.startswith(prefix)), key=lambda name: statistics.median(times[name]))


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)
