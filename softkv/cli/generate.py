"""`softkv generate`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from softkv.cli.console import fail
from softkv.cli.loading import describe_adapter, load_adapter
from softkv.cli.options import Adapter, Device, Dtype, Model, pairs

EXAMPLES = """
Examples:

    softkv generate runs/b "How do I read a CSV file?"

    softkv generate runs/a --field text="A joy from start to end." --max-new-tokens 2
"""


def generate(
    adapter: Adapter,
    text: Annotated[
        str | None, typer.Argument(help="The template's only field; - reads it from standard input.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option("--field", "-f", help="FIELD=TEXT, for templates with several fields.")
    ] = None,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: int = 0,
    arg: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: any option of transformers' generate.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Answer a prompt; the answer streams."""
    if not 0 < top_p <= 1:
        fail(f"--top-p expects a number above 0 and at most 1, got {top_p}")
    fields = _fields(describe_adapter(adapter)[0]["config"]["template"], text, pairs(field, "--field", parse=False))
    given = pairs(arg, "--arg")
    soft_model, tokenizer = load_adapter(adapter, model, dtype, device)

    import torch
    import transformers

    ids = torch.tensor([soft_model.method.encode(tokenizer, **fields)["input_ids"]], device=soft_model.device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        transformers.set_seed(seed)
        options |= {"temperature": temperature, "top_p": top_p}
    options |= given
    streams = options.get("num_beams", 1) == 1
    if streams:
        options["streamer"] = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        output = soft_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    except (TypeError, AttributeError) as error:
        if not given:
            raise
        raise ValueError(f"transformers' generate can't use --arg {' --arg '.join(arg or [])}: {error}") from error
    if not streams:
        print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def _fields(template: str, text: str | None, fields: dict[str, str]) -> dict[str, str]:
    from softkv.methods import Template

    names = Template.parse(template).fields
    if text is not None:
        left = [name for name in names if name not in fields]
        if len(left) != 1:
            fail(f"the template has the fields {', '.join(names) or 'none'}: give each with --field NAME=TEXT")
        fields[left[0]] = sys.stdin.read().strip() if text == "-" else text
    if set(fields) != set(names):
        fail(f"the template has the fields {', '.join(names) or 'none'}, got {', '.join(fields) or 'none'}")
    return fields
