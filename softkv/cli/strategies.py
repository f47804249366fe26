"""The table of `softkv plan --strategies`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from softkv.cli.console import out
from softkv.cli.units import in_bytes

if TYPE_CHECKING:  # torch and transformers take seconds to import
    from softkv.profiling.plan import PlannedStep

COLUMNS = {
    "parameters": "base",
    "gathered": "gathered",
    "trainable": "learned",
    "step": "step",
    "total": "device",
    "received": "received",
}


def show(model: str, job: PlannedStep, devices: int, *, as_json: bool) -> None:
    """Prints what each device takes in every way that so many can share a step."""
    from softkv.profiling.strategies import layouts, share

    shares = {layout.name: share(job, layout) for layout in layouts(job, devices)}
    found = {name: {key: getattr(each, key) for key in COLUMNS} for name, each in shares.items()}
    if as_json:
        print(json.dumps(found, indent=1))
        return
    checkpointed = ", checkpointing" if job.checkpointing else ""
    title = f"{model}, {job.method} P={job.length}, B={job.batch} T={job.longest}{checkpointed}, {devices} devices"
    table = Table("", *COLUMNS.values(), box=None, padding=(0, 1, 0, 0), title=escape(title), title_justify="left")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in found.items():
        table.add_row(name, *(in_bytes(each[key]) for key in COLUMNS))
    out.print(table)
    out.print(
        "Of a device: what FSDP2 gathers, what is learned with Adam's state, activations and workspace of a step,"
    )
    out.print("all of these, and what it receives in a step. Counted, not measured; allocators round up.")
