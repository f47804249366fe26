"""docs/learning.md's tables and curves, from committed results: `python -m benchmarks.learning_report` draws the
curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .learning import CONTESTANTS
from .learning_sets import SETS
from .results import FOLDER, read_json

PLOT = "learning.png"
WINDOW = 5  # steps of a point of a curve
Records = dict[str, Any]

TABLE = """\
`python -m benchmarks.learning`: SmolLM2-135M-Instruct ({dtype}), {steps} steps of {rows} rows, the same for all;
part of right answers among {test} test rows (with more than one seed, their mean; 95 % interval of Wilson over all),
and the mean loss of an answer's token in nats. softkv's methods run at their own learning rates, PEFT's at those of its
documentation. Cells that have not run are empty. {device}.

| | trainable | {sets} |
|---|---:|{lines}
{body}
"""

RATES = """\
One run each on `{data}`: {steps} steps of {rows_a_step} rows of at most {longest_row} tokens, seed {seed}, {dtype},
{length} slots or {soft_tokens} soft tokens; loss of an answer's token and part of right answers among {test_rows} test
rows. {cpu}, torch {torch}, {date}.

| | start | learning rate | loss | right |
|---|---|---|---:|---:|
{body}
"""


def rates_table() -> str:
    """What starts and learning rates gave, from records of the runs by which the defaults were chosen."""
    content = read_json(FOLDER / "learning_rates.json")
    rows = [
        f"| {one['method']} | {one['start']} | {one['rate']} | {one['loss']:.2f} | {one['accuracy']:.2f} |"
        for one in content["results"]
    ]
    return RATES.format(**content["settings"], body="\n".join(rows))


def learning_table() -> str:
    """The table of docs/learning.md."""
    records: Records = read_json(FOLDER / "learning.json")["results"]
    first = next(iter(records.values()))
    body = []
    for title in CONTESTANTS:
        cells = [_cell(_of(records, data, title)) for data in SETS]
        if any(cells):
            known = [one for data in SETS for one in _of(records, data, title)]
            trainable = max(one["trainable"] for one in known)
            body.append(f"| {title} | {trainable:,} | " + " | ".join(cells) + " |")
    about = first["machine"]
    trained = [one for one in records.values() if one["steps"]]
    return TABLE.format(
        dtype=first["dtype"],
        steps=" or ".join(sorted({str(one["steps"]) for one in trained})),
        rows=first["rows_a_step"],
        test=max(one["rows"] for one in records.values()),
        sets=" | ".join(SETS),
        lines="---:|" * len(SETS),
        body="\n".join(body),
        device=f"{about['cpu']}, torch {about['torch']}, {about['date'][:10]}",
    )


def _of(records: Records, data: str, title: str) -> list[Any]:
    return [record for name, record in records.items() if name.rpartition("/")[0] == f"{data}/{title}"]


def _cell(found: list[Any]) -> str:
    from softkv.train.classification import Accuracy

    if not found:
        return ""
    result = Accuracy(sum(one["correct"] for one in found), sum(one["rows"] for one in found))
    seeds = f", {len(found)} seeds" if len(found) > 1 else ""
    return f"{result}, {statistics.fmean(one['loss'] for one in found):.2f}{seeds}"


def draw(records: Records, path: Path) -> None:
    """A panel a data set: training losses, mean of 5 steps; with several seeds a band from the least to the most."""
    from matplotlib.figure import Figure

    sets = [data for data in SETS if any(name.startswith(f"{data}/") for name in records)]
    figure = Figure(figsize=(4.4 * len(sets), 4.2), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        axes.set(title=data, xlabel="step", ylabel="training loss (nats a token)", yscale="log")
        for number, title in enumerate(CONTESTANTS):
            curves = [_smooth(one["losses"]) for one in _of(records, data, title) if one["losses"]]
            if not curves:
                continue
            points = list(zip(*curves, strict=True))
            steps = [WINDOW * (i + 1) for i in range(len(points))]
            style = "--" if title.startswith(("PEFT", "LoRA")) else "-"
            axes.plot(steps, [statistics.fmean(p) for p in points], style, color=f"C{number % 10}", label=title)
            if len(curves) > 1:
                axes.fill_between(steps, [*map(min, points)], [*map(max, points)], color=f"C{number % 10}", alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6)
    figure.savefig(path, dpi=110)


def _smooth(losses: Iterable[float]) -> list[float]:
    values = list(losses)
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values) - WINDOW + 1, WINDOW)]


if __name__ == "__main__":
    draw(read_json(FOLDER / "learning.json")["results"], FOLDER / PLOT)
