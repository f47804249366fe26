"""Figures derived from the records of `attention`."""

from __future__ import annotations

import statistics
from typing import Any


def of_peak(record: dict[str, Any], name: str, kind: str = "cold") -> float:
    """The least time that the useful work could take at the machine's measured rates, as a part of the time it took."""
    one, peak = record["providers"][name], record["peak"]
    least = max(one["gflop"] / peak["gflop_per_s"], 1e-3 * one["mbyte"] / peak["gb_per_s"])
    return 1e3 * least / one[kind]["ms"]["median"]


def geometric_means(results: dict[str, Any]) -> dict[str, float]:
    """How many times faster than `cat` softkv is over the training shapes, by mode."""
    faster: dict[str, list[float]] = {}
    for record in results.values():
        if record["case"]["sweep"] == "training" and "cat" in record["providers"]:
            ratio = record["providers"]["cat"]["cold"]["speedup_of_ours"]["median"]
            faster.setdefault(record["case"]["mode"], []).append(ratio)
    return {mode: statistics.geometric_mean(ratios) for mode, ratios in faster.items()}
