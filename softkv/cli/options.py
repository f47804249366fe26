"""Options shared by several commands, and their parsing."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer

from softkv.cli.console import fail


def method_name(text: str) -> str:
    """A name in `softkv.methods.METHODS`, which is imported lazily because it imports torch."""
    from softkv.methods import METHODS

    if text not in METHODS:
        raise typer.BadParameter(f"expected one of {', '.join(METHODS)}, got {text!r}")
    return text


MethodName = Annotated[
    str, typer.Option(parser=method_name, metavar="METHOD", help="Soft-prompt method (softkv methods lists them).")
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base: a folder or an id on the Hugging Face Hub.")]
Adapter = Annotated[str, typer.Argument(help="Folder of a trained soft prompt, or an id on the Hugging Face Hub.")]
Data = Annotated[str, typer.Option("--data", "-d", help=".jsonl, .json, .csv or .tsv file, or a data set's name.")]
Split = Annotated[str, typer.Option(help="Split of a `datasets` data set: train, test\\[:100]...")]
Answer = Annotated[str, typer.Option(help="Column of the answer (a list in it: several right answers).")]
Fields = Annotated[list[str] | None, typer.Option("--field", "-f", help="FIELD=COLUMN, when their names differ.")]
Prompt = Annotated[str | None, typer.Option(help="Column of the prompt: short for --field X=COLUMN.")]
Verbalizers = Annotated[
    list[str] | None, typer.Option("--verbalizer", "-v", help="VALUE=TEXT: the answer text of a class.")
]
End = Annotated[bool, typer.Option(help="Append the model's end token to answers, so that generation stops.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read at most this many rows.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the base: auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda...; default: the first accelerator.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def pairs(given: list[str] | None, option: str, *, parse: bool = True) -> dict[str, Any]:
    """NAME=VALUE options; values that are JSON are what they say."""
    found: dict[str, Any] = {}
    for one in given or []:
        name, sign, value = one.partition("=")
        if not sign or not name:
            fail(f"{option} expects NAME=VALUE, got {one!r}")
        found[name.strip().replace("-", "_") if parse else name] = _value(value) if parse else value
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def check_above(**numbers: float) -> None:
    """One line for an option that is not a number above 0."""
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            fail(f"--{name.replace('_', '-')} expects a number above 0, got {number}")
