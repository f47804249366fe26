"""Plots with log axes, each line labelled at its end, and the floor dashed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .shapes import CPU, CUDA, GIVEN, QUICK

Records = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]  # by provider: points (x, y)

OURS, NAIVE, PEER, FLOOR = "#d9691e", "#2f6db5", "#4d9a6a", "#8b949e"
COLOURS = {"cat": NAIVE, "cat cached": "#7a5ab5", "PEFT": NAIVE, "no prefix": FLOOR, "floor": FLOOR}
COLOURS |= {"one by one": "#7a5ab5", "PEFT one by one": NAIVE}
FLOORS = ("no prefix", "floor")
AXES = {"P": "prefix slots (P)", "B": "rows (B)", "T": "tokens a row (T)", "A": "prefixes in the bank (A)"}
_LABEL_GAP = 0.055  # of the height of the axes


def draw(name: str, records: Records, folder: Path) -> list[Path]:
    """The plots of one benchmark's records; those it has too few cases for are left out."""
    figures = PLOTS[name](records)
    for title, figure in figures.items():
        figure.savefig(folder / f"{title}.png", dpi=110)
    return [folder / f"{title}.png" for title in figures]


def _attention(records: Records) -> dict[str, Figure]:
    figures = {}
    for sweep in dict.fromkeys(record["case"]["sweep"] for record in records.values()):
        chosen = [record for record in records.values() if record["case"]["sweep"] == sweep]
        known = next(sweeps[sweep] for sweeps in (CPU, CUDA, QUICK, GIVEN) if sweep in sweeps)
        if known.axis is None:
            for mode in dict.fromkeys(record["case"]["mode"] for record in chosen):
                rows = {_axes_of(one): _times(one) for one in chosen if one["case"]["mode"] == mode}
                title = f"attention-{sweep}" + (f"-{mode.replace(' + ', '-')}" if len(known.modes) > 1 else "")
                figures[title] = bars(known.title, rows, f"ms, {mode}")
        elif len(chosen) > 1:
            panels = {"ms": _lines(chosen, known.axis, _times), "working MiB": _lines(chosen, known.axis, _memory)}
            figures[f"attention-{sweep}"] = growth(known.title, AXES[known.axis], panels)
    return figures


def _train(records: Records) -> dict[str, Figure]:
    shown = ("softkv", "PEFT", "floor")
    medians = {
        one["case"]["title"]: {name: statistics.median(s) for name, s in one["seconds"].items() if name in shown}
        for one in records.values()
    }
    figures = {"train": bars("A training step", medians, f"seconds a step of {_only('rows', records)} rows")}
    growing = [one for one in records.values() if one["case"]["grows"]]
    if len(growing) > 1:
        panels = _seconds_and_memory(growing, shown, lambda one: one["case"]["settings"]["length"])
        figures["train-prefix"] = growth("P-tuning v2 as the prefix grows", AXES["P"], panels)
    return figures


def _generate(records: Records) -> dict[str, Figure]:
    if len(records) < 2:
        return {}
    shown = ("softkv", "PEFT", "no prefix")
    panels = _seconds_and_memory(list(records.values()), shown, lambda one: one["case"]["P"])
    title = f"{_only('new_tokens', records)} tokens for each of {_only('rows', records)} prompts"
    return {"generate": growth(title, AXES["P"], panels)}


def _adapters(records: Records) -> dict[str, Figure]:
    """Rows a second over the number of adapters in a batch."""
    panels: dict[str, Lines] = {}
    for one in records.values():
        case, lines = one["case"], panels.setdefault(f"{one['case']['mode']}: rows / s", {})
        for provider, seconds in one["seconds"].items():
            rate = case["rows"] / statistics.median(seconds)
            lines.setdefault(provider, []).append((case["adapters"], rate))
    if all(len(points) < 2 for lines in panels.values() for points in lines.values()):
        return {}
    title = f"A batch of {_only('rows', records)} rows"
    return {"adapters": growth(title, "different adapters in the batch", panels, from_zero=True)}


PLOTS: dict[str, Callable[[Records], dict[str, Figure]]] = {
    "attention": _attention,
    "train": _train,
    "generate": _generate,
    "adapters": _adapters,
}


def growth(title: str, xlabel: str, panels: dict[str, Lines], *, from_zero: bool = False) -> Figure:
    """A panel a quantity, each with a line a provider; on log axes, but for rates counted from zero."""
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axes, (quantity, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set(xscale="log", yscale="linear" if from_zero else "log", xlabel=xlabel, title=quantity)
        sizes = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=45 if len(sizes) > 5 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for provider, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            style = "--" if provider in FLOORS else "-"
            axes.plot(x, y, style, color=_colour(provider), marker="o", markersize=3.5, linewidth=2)
        if from_zero:
            axes.set_ylim(bottom=0)
        else:
            _plain_numbers(axes.yaxis)
        axes.set_xlim(right=sizes[-1] * (sizes[-1] / sizes[0]) ** 0.38)
        _name_lines(axes, lines)
    return figure


def _plain_numbers(axis: Axis) -> None:
    """1, 2, 5, 10, ... on a log axis; more where it spans little, powers of ten alone where it spans much."""
    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 4, 5, 7) if high < 12 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _name_lines(axes: Axes, lines: Lines) -> None:
    """Each line's name beside its last point; names that would lie on each other are moved apart."""
    ends = {provider: max(points) for provider, points in lines.items()}
    heights = {provider: _height(axes, end) for provider, end in ends.items()}
    for provider, height in moved_apart(heights, _LABEL_GAP).items():
        axes.annotate(
            f"  {provider}", (ends[provider][0], height), xycoords=("data", "axes fraction"), color=_colour(provider),
            va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _height(axes: Axes, point: tuple[float, float]) -> float:
    """Of a point, as a part of the height of the axes."""
    return float(axes.transAxes.inverted().transform(axes.transData.transform(point))[1])


def moved_apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights from 0 to 1 moved as little up, or from the top down, as keeps them `gap` apart."""
    order = sorted(heights, key=heights.__getitem__)
    places: list[float] = []
    for name in order:
        places.append(max(heights[name], places[-1] + gap) if places else heights[name])
    ceiling = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    return dict(zip(order, places, strict=True))


def bars(title: str, rows: dict[str, dict[str, float]], xlabel: str) -> Figure:
    """A group of bars a row, a bar a provider, its figure beside it."""
    providers = list(dict.fromkeys(name for row in rows.values() for name in row))
    height = 0.8 / max(1, len(providers))
    figure = Figure(figsize=(8, 1.2 + 0.24 * len(providers) * len(rows)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes = figure.add_subplot(xlabel=xlabel, xscale="log")
    for number, row in enumerate(rows.values()):
        for place, (provider, value) in enumerate(row.items()):
            y = number + height * (place - (len(row) - 1) / 2)
            axes.barh(y, value, height=0.92 * height, color=_colour(provider))
            axes.annotate(f" {value:.3g}  {provider}", (value, y), va="center", fontsize=8)
    values = [value for row in rows.values() for value in row.values()]
    low, high = min(values) / 2, max(values)
    axes.set_xlim(low, high * (high / low) ** 0.35)  # room for the figures beside the longest bars
    _plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colour(provider: str) -> str:
    return OURS if provider.startswith("softkv") else COLOURS.get(provider, PEER)


def _axes_of(record: Any) -> str:
    shape = record["case"]["shape"]
    return " ".join(f"{axis}{shape[axis]}" for axis in "BHGTPD")


def _times(record: Any) -> dict[str, float]:
    return {name: one["cold"]["ms"]["median"] for name, one in record["providers"].items()}


def _memory(record: Any) -> dict[str, float]:
    return {name: one["working_mib"] for name, one in record["providers"].items() if one["working_mib"]}


def _lines(records: list[Any], axis: str, values: Callable[[Any], dict[str, float]]) -> Lines:
    lines: Lines = {}
    for record in records:
        for provider, value in values(record).items():
            lines.setdefault(provider, []).append((record["case"]["shape"][axis], value))
    return lines


def _seconds_and_memory(records: list[Any], shown: tuple[str, ...], size: Callable[[Any], float]) -> dict[str, Lines]:
    seconds: Lines = {}
    memory: Lines = {}
    for record in records:
        for name in shown:
            if name in record["seconds"]:
                seconds.setdefault(name, []).append((size(record), statistics.median(record["seconds"][name])))
                memory.setdefault(name, []).append((size(record), record["peak_gib"][name]))
    return {"seconds": seconds, "peak GiB of the process": memory}


def _only(key: str, records: Records) -> str:
    return " or ".join(dict.fromkeys(str(record["case"][key]) for record in records.values()))
