"""docs/learning.md's tables and curves, from committed results: `python -m benchmarks.learning_report` draws the
curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from softkv.train.classification import Accuracy

from . import learning_peers
from .learning import CONTESTANTS, LENGTH, TOKENS
from .learning_sets import SETS
from .results import FOLDER, read_json

PLOT = "learning.png"
WINDOW = 5  # steps of a point of a training curve
Records = dict[str, Any]

TABLE = """\
`python -m benchmarks.learning`: SmolLM2-135M-Instruct ({dtype}), {steps} steps of {rows} rows, the same for all;
accuracy on {test} test rows (the mean of {seeds} seeds, or "of" fewer; Wilson's 95 % interval for that many rows), and
the mean loss of an answer token in nats. "Mean" is over the data sets. {device}.

| | trainable | CPU s / step | {sets} | mean |
|---|---:|---:|{lines}---:|
{body}
"""

RATES = """\
`python -m benchmarks.learning_search`: loss of an answer token, and accuracy, on {rows} rows held out of the training
rows; {steps} steps of 8 rows, one seed, {length} slots or {tokens} soft tokens. {device}.

| | learning rate | {sets} |
|---|---|{lines}
{body}
"""

STARTS = """\
Earlier runs, one each on `{data}`: {steps} steps of {rows_a_step} rows of at most {longest_row} tokens, seed {seed},
{length} slots; loss of an answer token, and accuracy, on {test_rows} test rows. {cpu}, torch {torch}, {date}.

| | initialisation | learning rate | loss | accuracy |
|---|---|---|---:|---:|
{body}
"""

COMMAND = """\
`python -m benchmarks.learning_command`: accuracy on the study's test rows after `softkv train`, given only the data,
its template and the method (one run each, {steps} steps of 16 rows), and the mean of the study's seeds for that method,
or for the best of its variants. {device}.

| | data | `softkv train` | the study | ratio |
|---|---|---:|---:|---:|
{body}
"""


def command_table() -> str:
    """What `softkv train` reaches, beside the study."""
    runs: Records = read_json(FOLDER / "learning_command.json")["results"]
    records = _records()
    body = []
    for name, run in runs.items():
        data, title = name.split("/")
        titles = [one for one in CONTESTANTS if one.split(",")[0] == title]
        known = [found for one in titles if (found := _of(records, data, one))]
        best = max((statistics.fmean(one["correct"] / one["rows"] for one in found) for found in known), default=None)
        reached = Accuracy(run["correct"], run["rows"])
        beside = "— | —" if best is None else f"{best:.3f} | {100 * reached.value / best:.0f} %"
        body.append(f"| {title} | {data} | {reached} | {beside} |")
    first = next(iter(runs.values()))
    steps = " or ".join(sorted({str(run["steps"]) for run in runs.values()}))
    return COMMAND.format(steps=steps, device=_device(first), body="\n".join(body))


def starts_table() -> str:
    """What starts gave."""
    content = read_json(FOLDER / "learning_starts.json")
    rows = [
        f"| {one['method']} | {one['start']} | {one['rate']} | {one['loss']:.2f} | {one['accuracy']:.2f} |"
        for one in content["results"]
    ]
    return STARTS.format(**content["settings"], body="\n".join(rows))


def rates_table() -> str:
    """What learning rates gave: the runs by which defaults were chosen."""
    records: Records = read_json(FOLDER / "learning_rates.json")["results"]
    sets = list(dict.fromkeys(name.split("/")[0] for name in records))
    body = []
    for title, rate in dict.fromkeys(tuple(name.split("/")[1:]) for name in records):
        found = [records.get(f"{data}/{title}/{rate}") for data in sets]
        cells = [f"{one['loss']:.2f}, {one['accuracy']:.2f}" if one else "" for one in found]
        body.append(f"| {title} | {rate} | " + " | ".join(cells) + " |")
    first = next(iter(records.values()))
    return RATES.format(
        rows=first["rows"],
        steps=first["steps"],
        length=LENGTH,
        tokens=TOKENS,
        device=_device(first),
        sets=" | ".join(sets),
        lines="---:|" * len(sets),
        body="\n".join(body),
    )


def learning_table() -> str:
    """The table of docs/learning.md."""
    records = _records()
    seeds = 1 + max(int(name.rpartition("/")[2]) for name in records)
    body = []
    for title in CONTESTANTS:
        found = {data: _of(records, data, title) for data in SETS}
        known = [one for each in found.values() for one in each]
        if not known:
            continue
        speeds = [one["looks"][-1][1] / one["steps"] for one in known if one["steps"]]
        speed = f"{statistics.median(speeds):.2f}" if speeds else "—"
        means = [statistics.fmean(one["correct"] / one["rows"] for one in each) for each in found.values() if each]
        mean = f"{statistics.fmean(means):.3f}" if len(means) == len(SETS) else ""
        told = [_cell(each, seeds) for each in found.values()]
        cells = [f"{max(one['trainable'] for one in known):,}", speed, *told, mean]
        body.append(f"| {title} | " + " | ".join(cells) + " |")
    first = next(iter(records.values()))
    return TABLE.format(
        dtype=first["dtype"],
        steps=" or ".join(sorted({str(one["steps"]) for one in records.values() if one["steps"]})),
        rows=first["rows_a_step"],
        seeds=seeds,
        test=max(one["rows"] for one in records.values()),
        sets=" | ".join(SETS),
        lines="---:|" * len(SETS),
        body="\n".join(body),
        device=_device(first),
    )


def peers_table() -> str:
    """softkv's methods less PEFT's."""
    return learning_peers.differences_table(_records())


def variants_table() -> str:
    """Variants less the defaults."""
    return learning_peers.variants_table(_records())


def times_table() -> str:
    """How soon softkv's methods are where PEFT's end."""
    return learning_peers.times_table(_records())


def _records() -> Records:
    records: Records = read_json(FOLDER / "learning.json")["results"]
    return records


def _of(records: Records, data: str, title: str) -> list[Any]:
    return [record for name, record in records.items() if name.rpartition("/")[0] == f"{data}/{title}"]


def _device(record: Any) -> str:
    about = record["machine"]
    return f"{about['cpu']}, torch {about['torch']}, {about['date'][:10]}"


def _cell(found: list[Any], seeds: int) -> str:
    if not found:
        return ""
    result = Accuracy(sum(one["correct"] for one in found), sum(one["rows"] for one in found))
    fewer = f" (of {len(found)})" if len(found) < seeds else ""
    return f"{result}, {statistics.fmean(one['loss'] for one in found):.2f}{fewer}"


def draw(records: Records, path: Path) -> None:
    """A column a data set: training losses (means of 5 steps) and accuracy on held-out rows; lines are means of
    the seeds, bands go from the least to the most. Variants are left out."""
    from matplotlib.figure import Figure

    sets = [data for data in SETS if any(name.startswith(f"{data}/") for name in records)]
    figure = Figure(figsize=(4.4 * len(sets), 7), layout="constrained")
    grid = figure.subplots(2, len(sets), squeeze=False)
    for column, data in enumerate(sets):
        grid[0][column].set(title=data, ylabel="training loss (nats a token)", yscale="log")
        grid[1][column].set(xlabel="step", ylabel="accuracy on held-out rows")
        for number, title in enumerate(title for title, one in CONTESTANTS.items() if one.trains and not one.variant):
            found = [one for one in _of(records, data, title) if one["losses"]]
            if not found:
                continue
            style: dict[str, Any] = {"color": f"C{number}", "label": title}
            style["linestyle"] = "--" if CONTESTANTS[title].kind != "softkv" else "-"
            losses = [_smooth(one["losses"]) for one in found]
            _band(grid[0][column], [WINDOW * (i + 1) for i in range(len(losses[0]))], losses, style)
            right = [[look[2] / one["looked_at"] for look in one["looks"]] for one in found]
            _band(grid[1][column], [look[0] for look in found[0]["looks"]], right, style)
        for axes in (grid[0][column], grid[1][column]):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=100)


def _band(axes: Any, steps: list[int], curves: list[list[float]], style: dict[str, Any]) -> None:
    points = list(zip(*curves, strict=True))
    axes.plot(steps, [statistics.fmean(point) for point in points], **style)
    axes.fill_between(steps, [*map(min, points)], [*map(max, points)], color=style["color"], alpha=0.12, linewidth=0)


def _smooth(losses: Iterable[float]) -> list[float]:
    values = list(losses)
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]


if __name__ == "__main__":
    draw(_records(), FOLDER / PLOT)
