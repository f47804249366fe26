"""softkv's methods against PEFT's on the same rows and seeds: a paired test, and the time to what PEFT ends with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .learning_sets import SETS

PEERS = {
    "P-tuning v2": "PEFT prefix tuning",
    "Prefix-tuning": "PEFT prefix tuning",
    "Prompt-tuning": "PEFT prompt tuning",
    "P-tuning": "PEFT p-tuning",
}
OTHERS = [
    ("P-tuning v2", "full fine-tuning"),
    ("P-tuning v2", "LoRA, r = 8"),
    ("Prefix-tuning", "P-tuning v2"),
    ("Prompt-tuning, before", "Prompt-tuning"),
    ("Prompt-tuning, from a text", "Prompt-tuning"),
    ("P-tuning v2, from a text", "P-tuning v2"),
    ("P-tuning v2, random", "P-tuning v2"),
    ("P-tuning v2, reparametrised", "P-tuning v2"),
    ("P-tuning v2, LSTM encoder", "P-tuning v2"),
    ("P-tuning v2, attention encoder", "P-tuning v2"),
    ("Prefix-tuning, random", "Prefix-tuning"),
]
DRAWS = 2000
Records = dict[str, Any]
Pairs = list[tuple[str, Any, Any]]  # data set, softkv's record, PEFT's record

DIFFERENCES = """\
Accuracy of softkv's method minus that of PEFT's, in percentage points, on the same test rows with the same seeds; 95 %
bootstrap interval over rows and seeds; in brackets the p of McNemar's exact test. "All" is the mean of the data sets.

| | {sets} | all |
|---|{lines}---:|
{body}
"""
VARIANTS = """\
Accuracy of the first less that of the second, as above, at the seeds that both have (one of each variant, two of full
fine-tuning).

| | {sets} | all |
|---|{lines}---:|
{body}
"""
TIMES = """\
CPU seconds of training until the loss on held-out rows is as low as PEFT's after all steps, as a fraction of PEFT's for
all steps: the median of the runs that get there, and how many do (evaluated after 5, 10, 20 and 40 steps).

| | {sets} | all |
|---|{lines}---:|
{body}
"""


def differences_table(records: Records) -> str:
    """How many more rows are right than in PEFT, with a paired test."""
    return _table(DIFFERENCES, records, told_difference)


def times_table(records: Records) -> str:
    """How soon PEFT's last held-out loss is reached."""
    return _table(TIMES, records, told_time)


def variants_table(records: Records) -> str:
    """Variants less the default, and P-tuning v2 less what trains more parameters, at the seeds that both have."""
    return _table(VARIANTS, records, told_difference, OTHERS)


def _table(
    frame: str, records: Records, told: Callable[[Pairs], str], against: Iterable[tuple[str, str]] = PEERS.items()
) -> str:
    body = []
    for ours, theirs in against:
        found = list(pairs(records, ours, theirs))
        cells = [told([one for one in found if data in (None, one[0])]) for data in (*SETS, None)]
        body.append(f"| {ours} against {theirs} | " + " | ".join(cells) + " |")
    return frame.format(sets=" | ".join(SETS), lines="---:|" * len(SETS), body="\n".join(body))


def pairs(records: Records, ours: str, theirs: str) -> Iterator[tuple[str, Any, Any]]:
    """Records of both on the same data set at the same seed."""
    for name, one in records.items():
        data, title, seed = name.split("/")
        other = records.get(f"{data}/{theirs}/{seed}")
        if title == ours and other is not None:
            yield data, one, other


def told_difference(found: Pairs) -> str:
    if not found:
        return ""
    points, (low, high), p = difference(found)
    return f"{points:+.1f} [{low:+.1f}, {high:+.1f}] ({'< 0.001' if p < 1e-3 else f'{p:.2g}'})"


def difference(found: Pairs) -> tuple[float, tuple[float, float], float]:
    """Points by which the first of each pair is better, their 95 % interval, and McNemar's p.

    Rows and seeds of a data set are drawn apart, with replacement: a row that is hard at every seed is hard once.
    """
    import numpy as np
    from scipy.stats import binomtest

    gains: dict[str, list[Any]] = {}
    for data, one, other in found:
        gains.setdefault(data, []).append([int(a) - int(b) for a, b in zip(one["hits"], other["hits"], strict=True)])
    grids = [np.array(rows) for rows in gains.values()]  # [seeds, rows] each
    generator = np.random.default_rng(0)
    means = np.zeros(DRAWS)
    for grid in grids:
        for draw in range(DRAWS):
            seeds, rows = (generator.integers(size, size=size) for size in grid.shape)
            means[draw] += grid[seeds][:, rows].mean() / len(grids)
    low, high = (100 * float(bound) for bound in np.percentile(means, [2.5, 97.5]))
    better, worse = (sum(int((sign * grid > 0).sum()) for grid in grids) for sign in (1, -1))
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return 100 * sum(float(grid.mean()) for grid in grids) / len(grids), (low, high), p


def told_time(found: Pairs) -> str:
    if not found:
        return ""
    parts = [part for _, one, other in found if (part := time_to(one, other)) is not None]
    return f"{statistics.median(parts):.2f} ({len(parts)} of {len(found)})" if parts else f"— (0 of {len(found)})"


def time_to(one: Any, other: Any) -> float | None:
    """Of the time that `other` trained, the part after which `one` had its last held-out loss."""
    _, whole, _, goal = other["looks"][-1]
    return next((seconds / whole for _, seconds, _, loss in one["looks"] if loss <= goal), None)
