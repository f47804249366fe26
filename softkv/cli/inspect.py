"""`softkv inspect`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from softkv.cli.console import fail, out
from softkv.cli.loading import describe_adapter, load_adapter
from softkv.cli.options import Adapter, Answer, AsJson, Device, Dtype, Fields, Model, Prompt, Split, Verbalizers

EXAMPLES = """
Examples:

    softkv inspect runs/a

    softkv inspect runs/a --on test.jsonl --answer label --plot attention.png
"""


def inspect(
    adapter: Adapter,
    on: Annotated[
        str | None, typer.Option(help="Rows (like train's --data): also show how much attention goes to the prefix.")
    ] = None,
    model: Model = None,
    prompt: Prompt = None,
    answer: Answer = "answer",
    field: Fields = None,
    verbalizer: Verbalizers = None,
    split: Split = "test",
    limit: Annotated[int, typer.Option(min=1, help="Number of rows to use.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Plot the attention of each layer and head to this file.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Show a soft prompt's method, settings, shapes, number of values and base, without loading the base.

    With --on, load the base and show the share of attention that goes to the prefix, per layer."""
    config, shapes = describe_adapter(adapter)
    if plot is not None and on is None:
        fail("--plot expects rows: give --on")
    mass: list[list[float]] | None = None
    if on is not None:
        mass = _attention_mass(
            adapter, config, on, model, (prompt, answer, field, verbalizer), split, limit, dtype, device
        )
        if plot is not None:
            _draw(mass, plot)
    values = sum(map(math.prod, shapes.values()))
    if as_json:
        found = {} if mass is None else {"attention_mass": mass}
        print(json.dumps(config | {"shapes": shapes, "values": values} | found))
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
    kept = "for inference" if config["folded"] else "for further training: networks are kept"
    table.add_row("format", f"{config['format']}, {kept}")
    out.print(table)
    if mass is not None:
        out.print(_mass_table(mass))
        if plot is not None:
            out.print(f"Plot: {plot}", soft_wrap=True)


def _attention_mass(
    adapter: str,
    config: dict[str, Any],
    data: str,
    model: str | None,
    columns: tuple[str | None, str, list[str] | None, list[str] | None],
    split: str,
    limit: int,
    dtype: str,
    device: str | None,
) -> list[list[float]]:
    from softkv.cli.rows import columns_of, examples_of
    from softkv.train.data import read_filled

    prompt, answer, field, verbalizer = columns
    filled = columns_of(config["config"]["template"], answer, field, prompt, verbalizer)
    rows = read_filled(filled, data, split=split, limit=limit)
    soft_model, tokenizer = load_adapter(adapter, model, dtype, device)

    from softkv.hf.attention_mass import attention_mass

    return attention_mass(soft_model, examples_of(soft_model, tokenizer, rows, [])).tolist()


def _mass_table(mass: list[list[float]]) -> Table:
    table = Table("layer", box=None, title="share of attention that goes to the prefix", title_justify="left")
    for name in ("mean", "least head", "most"):
        table.add_column(name, justify="right")
    for layer, heads in enumerate(mass):
        table.add_row(str(layer), *(f"{each:.3f}" for each in (sum(heads) / len(heads), min(heads), max(heads))))
    return table


def _draw(mass: list[list[float]], path: Path) -> None:
    """Draw layers downwards and heads to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 0.3 * len(mass[0]), 1.5 + 0.16 * len(mass)), layout="constrained")
    axes = figure.add_subplot(xlabel="head", ylabel="layer", title="attention to the prefix")
    image = axes.imshow(mass, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
