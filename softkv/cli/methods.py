"""`softkv methods`."""

from __future__ import annotations

import inspect
import re
import textwrap
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from softkv.cli.console import out
from softkv.cli.options import method_name
from softkv.profiling.presets import PRESETS

if TYPE_CHECKING:  # torch takes seconds to import
    from softkv.methods import Method
    from softkv.methods.base import BaseShape

EXAMPLES = """
Examples:

    softkv methods

    softkv methods p-tuning-v2 --model llama-3.1-8b --length 128
"""

Preset = Enum("Preset", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]


def methods(
    method: Annotated[
        str | None, typer.Argument(parser=method_name, metavar="METHOD", help="Explain only this one.")
    ] = None,
    model: Annotated[Preset, typer.Option("--model", "-m", help="Count the values for this base.")] = Preset(  # noqa: B008
        "smollm2-135m"
    ),
    length: Annotated[int, typer.Option(min=1, help="Soft tokens or slots to count.")] = 32,
) -> None:
    """Explain the methods: when to use each, how many values it learns, and its options (for --set)."""
    from dataclasses import MISSING, fields

    from softkv.methods import METHODS

    shape = shape_of(PRESETS[model.value])
    for name, config in METHODS.items():
        if method not in (None, name):
            continue
        out.print(f"[bold]{name}[/]: {escape((config.__doc__ or '').splitlines()[0])}", soft_wrap=True)
        if config.suits:
            out.print(f"  {config.suits}", soft_wrap=True)
        count = f"{learned_values(config, shape, length):,} for {model.value} and n = {length}"
        out.print(f"  learns {config.learns or 'these'} values: {count}", soft_wrap=True)
        told = explained(config)
        for one in fields(config):  # type: ignore[arg-type]
            default = "needed" if one.default is MISSING else repr(one.default)
            text = f"{one.name}={default}"
            out.print(escape(f"    {text:28} {told[one.name]}"), soft_wrap=True)
        out.print()


def shape_of(config: dict[str, Any]) -> BaseShape:
    """The sizes that determine the shapes of learned values, for a base with these fields in its config."""
    from softkv.methods.base import BaseShape

    width, vocabulary = config["hidden_size"], config["vocab_size"]
    head_dim = config.get("head_dim", width // config["num_attention_heads"])
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    return BaseShape(layers, kv_heads, head_dim, head_dim, width, width, vocabulary)


def learned_values(config: type[Method], shape: BaseShape, length: int) -> int:
    """The number of values that the method trains on a base of this shape."""
    from softkv.methods.placeholder import Placeholder

    return sum(parameter.numel() for parameter in config.of_length(length).build(Placeholder(shape)).parameters())


def explained(config: type) -> dict[str, str]:
    """The explanation of each option, from the docstring's Args."""
    doc = inspect.cleandoc(config.__doc__ or "")
    block = textwrap.dedent(doc.partition("Args:\n")[2].partition("\n\n")[0])
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
