"""One HTML file for a folder of results: plots, tables, and environments."""

from __future__ import annotations

import base64
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from softkv.profiling.files import write_whole

from .plots import draw
from .results import read_json
from .tables import GRIDS, Grid

TITLES = {
    "attention": "Attention",
    "train": "Training",
    "generate": "Generation",
    "adapters": "Many adapters in a batch",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
img { max-width: 100%; display: block; margin: 1rem 0 }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: 13px }
caption { text-align: left; font-weight: 600; padding: .5rem 0 }
th, td { padding: .15rem .6rem; border-bottom: 1px solid #d8dee4; text-align: right }
th:first-child, td:first-child { text-align: left }
p.note { color: #59636e; margin: 0 0 1rem }
"""


def write(folder: Path) -> Path:
    """Draws the plots of the results in a folder and writes `report.html` beside them."""
    parts = []
    for name, title in TITLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            parts.append(_section(title, name, read_json(path)["results"], folder))
    page = f"<!doctype html><meta charset=utf-8><title>softkv bench</title><style>{STYLE}</style><h1>softkv bench</h1>"
    target = folder / "report.html"
    write_whole(target, page + "\n".join(parts) + "\n")
    return target


def _section(title: str, name: str, records: dict[str, Any], folder: Path) -> str:
    parts = [f"<h2>{title}</h2>", *(_origin(one) for one in _origins(records))]
    parts += [_image(plot) for plot in draw(name, records, folder)]
    for group, cases in groupby(records.items(), key=lambda item: item[0].split("/")[0]):
        tables = "".join(_table(GRIDS[name](case, record)) for case, record in cases)
        parts.append(f"<details><summary>{escape(group)}</summary>{tables}</details>")
    return "\n".join(parts)


def _origins(records: dict[str, Any]) -> list[dict[str, Any]]:
    """Machine, commit and settings of the records, each kind once."""
    kinds = {}
    for record in records.values():
        about = {key: value for key, value in record["machine"].items() if key not in ("date", "load")}
        kinds[str((about, record["settings"]))] = {
            "first made by": record["command"],
            "on": record["machine"]["date"],
        } | {key: value for key, value in (about | record["settings"]).items() if value is not None}
    return list(kinds.values())


def _origin(about: dict[str, Any]) -> str:
    return f"<p class=note>{escape(', '.join(f'{key} {value}' for key, value in about.items()))}</p>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in grid.notes)
    return f"<table><caption>{escape(grid.title)}</caption><tr>{head}</tr>{rows}</table>{notes}"
