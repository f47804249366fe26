"""`softkv methods`."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

import typer
from rich.markup import escape

from softkv.cli.console import out
from softkv.cli.options import MethodName
from softkv.profiling.presets import PRESETS

EXAMPLES = """
Examples:

    softkv methods

    softkv methods p-tuning-v2 --model llama-3.1-8b --length 128
"""

Preset = Enum("Preset", {name: name for name in PRESETS}, type=str)  # type: ignore[misc]


@dataclass(frozen=True)
class Sizes:
    """Of a base: C hidden size, G key/value heads, D head dim, L layers."""

    C: int
    G: int
    D: int
    L: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim", width // heads)
        return cls(width, config["num_key_value_heads"], head_dim, config["num_hidden_layers"])


@dataclass(frozen=True)
class Choice:
    """Why one takes a method, and what it learns."""

    why: str
    formula: str
    count: Callable[[Sizes, int], int]  # of a base and n soft tokens or slots


def _encoder(sizes: Sizes, n: int, E: int = 256) -> int:
    C, half = sizes.C, E // 2
    lstm = 2 * (4 * half * (C + half + 2) + 4 * half * (E + half + 2))
    return n * C + lstm + E * (E + 1) + C * (E + 1)


CHOICES = {
    "prompt-tuning": Choice(
        "the fewest values, any causal model; learns well on large bases, with a rate of about 3e-2",
        "n·C",
        lambda sizes, n: n * sizes.C,
    ),
    "p-tuning": Choice(
        "soft tokens at places of a template; learns through an encoder, which is dropped afterwards: n·C values stay",
        "n·C and the encoder's",
        _encoder,
    ),
    "prefix-tuning": Choice(
        "the smallest prefix, one pair of matrices for all layers; learns least",
        "2·n·G·D",
        lambda sizes, n: 2 * n * sizes.G * sizes.D,
    ),
    "p-tuning-v2": Choice(
        "the usual choice; learns most, above all from a text (--init-text) or from --set init=vocabulary",
        "2·n·G·D·L",
        lambda sizes, n: 2 * n * sizes.G * sizes.D * sizes.L,
    ),
}


def methods(
    method: Annotated[MethodName | None, typer.Argument(help="Of this one alone.")] = None,
    model: Annotated[Preset, typer.Option("--model", "-m", help="Count the values for this base.")] = Preset(  # noqa: B008
        "smollm2-135m"
    ),
    length: Annotated[int, typer.Option(min=1, help="Soft tokens or slots to count.")] = 32,
) -> None:
    """Explain the methods: why one takes each, how many values it learns, and its options (for --set)."""
    from dataclasses import MISSING, fields

    from softkv.methods import METHODS

    sizes = Sizes.of(PRESETS[model.value])
    for name, config in METHODS.items():
        if method is not None and method.value != name:
            continue
        choice = CHOICES[name]
        out.print(f"[bold]{name}[/]: {escape((config.__doc__ or '').splitlines()[0])}", soft_wrap=True)
        out.print(f"  {choice.why}", soft_wrap=True)
        count = f"{choice.count(sizes, length):,} for {model.value} and n = {length}"
        out.print(f"  learns {choice.formula} values: {count}", soft_wrap=True)
        told = explained(config)
        for one in fields(config):  # type: ignore[arg-type]
            default = "needed" if one.default is MISSING else repr(one.default)
            text = f"{one.name}={default}"
            out.print(escape(f"    {text:28} {told[one.name]}"), soft_wrap=True)
        out.print()


def explained(config: type) -> dict[str, str]:
    """What each option is, from the docstring's Args."""
    doc = inspect.cleandoc(config.__doc__ or "")
    block = textwrap.dedent(doc.partition("Args:\n")[2].partition("\n\n")[0])
    entries = re.findall(r"^(\w+): (.*(?:\n .*)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
