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
    """Print the memory and traffic of each device, for every way of sharing a step."""
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
        "Per device: weights gathered by FSDP2, trained values with Adam's state, activations and workspace of a step,"
    )
    out.print("their sum, and the bytes received per step. Counted, not measured; allocators round up.")
