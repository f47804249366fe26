"""`softkv inspect`."""

from __future__ import annotations

import json
import math

from rich.markup import escape
from rich.table import Table

from softkv.cli.console import out
from softkv.cli.loading import describe_adapter
from softkv.cli.options import Adapter, AsJson

EXAMPLES = "Example:\n\n    softkv inspect runs/a"


def inspect(adapter: Adapter, as_json: AsJson = False) -> None:
    """Show a soft prompt's method, settings, shapes, number of values and base, without loading the base."""
    config, shapes = describe_adapter(adapter)
    values = sum(map(math.prod, shapes.values()))
    if as_json:
        print(json.dumps(config | {"shapes": shapes, "values": values}))
        return
    settings = {name: value for name, value in config["config"].items() if value is not None}
    base = config["base"]
    table = Table(show_header=False, box=None)
    table.add_row("method", config["method"])
    table.add_row("settings", escape(", ".join(f"{name}={value!r}" for name, value in settings.items())))
    known = [base.get("model_type"), f"{base['layers']} layers" if "layers" in base else None]
    table.add_row("base", escape(f"{base['name'] or '?'} ({', '.join(filter(None, known)) or 'of any kind'})"))
    table.add_row("values", f"{values:,}")
    for name, shape in shapes.items():
        table.add_row("", f"{name} {escape(str(shape))}")
    kept = "for inference" if config["folded"] else "to train on: networks are kept"
    table.add_row("format", f"{config['format']}, {kept}")
    out.print(table)
