"""Interleaved timing: every provider runs once per round, so that a slow phase of the machine affects all of them. The
order is random in each round, because each provider leaves its caches and heap to the next.

A sample is `cold`, a single call after the other providers' calls, or `hot`, the mean of several consecutive calls.
Ratios are computed per round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Run = Callable[[], object]
_HOT_SECONDS = 0.002
_CALLS_ON_STREAM = 3  # before a capture, as torch.cuda.graph asks
_MOST_CACHE = 256 << 20  # bytes, more than the L2 cache of any GPU


@dataclass(frozen=True)
class Spread:
    """Median and the middle 80 % of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: list[float]) -> Spread:
        ordered = sorted(sample)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


class Clock(Protocol):
    def prepared(self, run: Run) -> Run:
        """What is timed in place of `run`."""

    def seconds(self, run: Run, calls: int) -> float:
        """Mean time of a call."""


class HostClock:
    """Wall-clock time of calls that return when they are done."""

    def prepared(self, run: Run) -> Run:
        return run

    def seconds(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """CUDA events around replays of a captured graph, so that launching costs the same for every provider. Before each
    sample the L2 cache is overwritten: what a cold call finds there is not its own."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda
        self.cache = torch.empty(_MOST_CACHE, dtype=torch.int8, device="cuda")

    def prepared(self, run: Run) -> Run:
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(_CALLS_ON_STREAM):
                run()
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            run()
        return graph.replay

    def seconds(self, run: Run, calls: int) -> float:
        start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls


def clock_of(device: str) -> Clock:
    return CudaClock() if device == "cuda" else HostClock()


def interleaved(
    providers: Mapping[str, Run],
    seconds: float = 2.0,
    at_least: int = 7,
    at_most: int = 60,
    *,
    hot: bool = True,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each provider, one number a round; a hot number averages enough calls to take about 2 ms."""
    clock = clock or HostClock()
    calls = {}
    for name, run in providers.items():
        run()
        calls[name] = max(1, int(_HOT_SECONDS / max(clock.seconds(run, 1), 1e-7))) if hot else 1
    times: dict[str, list[float]] = {name: [] for name in providers}
    names, start = list(providers), time.perf_counter()
    order = random.Random(0)
    for round_number in range(at_most):
        if round_number >= at_least and time.perf_counter() - start > seconds:
            break
        for name in order.sample(names, len(names)):
            times[name].append(1e3 * clock.seconds(providers[name], calls[name]))
    return times


def speedup(times: Mapping[str, list[float]], ours: str, theirs: str) -> Spread:
    """How many times faster ours is, from the ratios within each round."""
    return Spread.of([b / a for a, b in zip(times[ours], times[theirs], strict=True)])


def fastest(times: Mapping[str, list[float]]) -> str:
    return min(times, key=lambda name: statistics.median(times[name]))


def summary(times: Mapping[str, list[float]], ours: str) -> dict[str, Any]:
    """Of each provider: its spread in ms and how many times faster ours is."""
    from dataclasses import asdict

    return {
        name: {"ms": asdict(Spread.of(sample)), "speedup_of_ours": asdict(speedup(times, ours, name))}
        for name, sample in times.items()
    }
