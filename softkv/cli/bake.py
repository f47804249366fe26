"""`softkv bake`."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from softkv.cli.console import fail, out
from softkv.cli.loading import load_adapter, load_base, on_device

EXAMPLES = """
Examples:

    softkv bake runs/prompt --output runs/prefix

    softkv bake -m HuggingFaceTB/SmolLM2-135M-Instruct --text "Answer in one word." -o runs/brief

    softkv bake -m MODEL --text-file handbook.txt -o runs/handbook --template "[question]\\nAnswer: [Y]"
"""


class Format(str, Enum):
    SOFTKV = "softkv"
    PEFT = "peft"


def bake(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the prefix.")],
    adapter: Annotated[
        str | None, typer.Argument(help="Adapter with soft tokens before the input: a folder, or an id on the Hub.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A text to bake instead; - reads it from standard input.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    template: Annotated[str | None, typer.Option(help="Layout of the rows after the text.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base: a folder or an id on the Hugging Face Hub.")
    ] = None,
    format: Annotated[Format, typer.Option(help="File format to write.")] = Format.SOFTKV,
    dtype: Annotated[str, typer.Option(help="Dtype of the base: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda...; by default the first accelerator.")] = None,
) -> None:
    """Convert what precedes every input (soft tokens, a text or a document) to a prefix with the same outputs."""
    if [adapter, text, text_file].count(None) != 2:
        fail("bake expects one of: an adapter, --text, --text-file")
    if adapter is not None and template is not None:
        fail("--template is only for texts: an adapter has its own")
    if adapter is None and model is None:
        fail("which base? Give --model")
    if text_file is not None:
        text = text_file.read_text(encoding="utf-8")
    elif text == "-":
        text = sys.stdin.read()
    row = (template or "[X] [Y]").replace("\\n", "\n")

    import softkv

    if adapter is not None:
        soft_model, tokenizer = load_adapter(adapter, model, dtype, device)
        baked = softkv.bake(soft_model, tokenizer=tokenizer)
    else:
        assert model is not None
        base, tokenizer = load_base(model, dtype)
        baked = softkv.bake(on_device(base, device), text=text, tokenizer=tokenizer, template=row)
    baked.save_pretrained(output, format=format.value)
    prefix = baked.soft.prefix()
    assert prefix is not None
    out.print(f"{prefix.length} slots, {baked.num_trainable():,} values\nPrefix: {output}", soft_wrap=True)
