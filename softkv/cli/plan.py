"""`softkv plan`."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from softkv.cli.console import err, fail, friendly, out
from softkv.cli.options import MethodName
from softkv.cli.profile import TargetName
from softkv.cli.strategies import show as show_strategies
from softkv.cli.units import in_bytes, in_flops

EXAMPLES = """Examples:

    softkv plan --model llama-3.1-405b --length 128 --batch 64 --devices 16

    softkv plan --model llama-3.1-70b --batch 1 --tokens 1000000 -P 16384 --checkpointing --devices 8 --strategies"""


class EncoderName(str, Enum):
    LSTM = "lstm"
    ATTENTION = "attention"


def _lengths(text: str) -> tuple[int, ...]:
    """`30,45,80`"""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        fail(f"--lengths expects whole numbers such as 30,45,80, got {text!r}")


@friendly
def plan(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Folder with a config.json, id on the Hub, or a preset: llama-3.1-405b…"),
    ],
    method: MethodName = "p-tuning-v2",
    length: Annotated[int, typer.Option("--length", "-P", min=1, help="Slots, or soft tokens.")] = 64,
    batch: Annotated[int, typer.Option("--batch", "-B", min=1, help="Rows per step, over all devices.")] = 16,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", "-T", min=1, help="Tokens per row, prompt and answer.  [default: 1024]", show_default=False
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="30,45,80",
            help="Lengths of rows, instead of --tokens: rows take these in turn. softkv packs them, "
            "concatenation pads to the longest.",
        ),
    ] = None,
    answer: Annotated[int, typer.Option(min=1, help="Labelled tokens per row.")] = 32,
    encoder: Annotated[
        EncoderName | None, typer.Option(help="P-tuning v2's encoder, which computes K and V from prompts.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the frozen base: bfloat16, float16 or float32.")] = "bfloat16",
    devices: Annotated[int, typer.Option(min=1, help="Rows and frozen weights are split evenly over them.")] = 1,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute each layer in backward.")] = False,
    target: Annotated[TargetName, typer.Option(help="Device whose kernels' memory is counted.")] = TargetName.SM_90,
    strategies: Annotated[
        bool,
        typer.Option("--strategies", help="Memory and traffic per device: DDP, FSDP2, tensor parallelism."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict bytes and FLOPs of a training step from a model's config, compared with concatenation."""
    import torch

    from softkv.profiling import plan as planning

    if dtype not in ("bfloat16", "float16", "float32"):
        fail(f"--dtype expects bfloat16, float16 or float32, got {dtype!r}")
    if tokens is not None and lengths is not None:
        fail("--tokens and --lengths both set the length of rows: give one of them")
    with err.status(f"running the step of {escape(model)} without values…"):
        job = planning.PlannedStep(
            planning.config_of(model),
            method,
            length,
            batch,
            (tokens or 1024) if lengths is None else _lengths(lengths),
            answer,
            getattr(torch, dtype),
            1 if strategies else devices,
            checkpointing,
            None if encoder is None else encoder.value,
            target.value,
        )
        if strategies:
            show_strategies(model, job, devices, as_json=as_json)
            return
        content = planning.report(job, planning.plan(job))
    if as_json:
        print(json.dumps(content, indent=1))
        return
    _show_plan(model, content)


PLAN_ROWS = {
    "parameters": "frozen base",
    "trainable": "trained values, gradients, Adam",
    "prefix": "prefix K/V",
    "activations": "activations",
    "workspace": "workspace of the backward",
    "kernels": "workspace of attention kernels",
    "total": "training step",
    "kv_cache": "K/V cache when generating",
    "forward_flops": "forward",
    "backward_flops": "backward",
    "attention_flops": "of these, attention",
}


def _show_plan(model: str, content: dict[str, Any]) -> None:
    settings = content["settings"]
    tokens, encoder, devices = settings["tokens"], settings["encoder"], settings["devices"]
    title = (
        f"{model}, {settings['method']}{f' ({encoder} encoder)' if encoder else ''} P={settings['length']}, "
        f"B={settings['batch']} T={tokens if isinstance(tokens, int) else ','.join(map(str, tokens))}, "
        f"{settings['dtype']}, a step{f' on each of {devices} devices' if devices > 1 else ''}"
    )
    softkv, other = content["costs"]["softkv"], content["costs"].get("concatenating")
    table = Table("", "softkv", "concatenating", "", title=escape(title), title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, label in PLAN_ROWS.items():
        size = in_flops if key.endswith("flops") else in_bytes
        ratio = f"{other[key] / softkv[key]:.2f}×" if other and softkv[key] else ""
        style = "bold" if key == "total" else None
        table.add_row(label, size(softkv[key]), size(other[key]) if other else "not possible", ratio, style=style)
    out.print(table)
    out.print(
        "Counted on the shapes of tensors, not measured; rounding by an allocator and memory of the driver come on top."
    )
