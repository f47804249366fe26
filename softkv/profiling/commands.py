"""`softkv profile …`: kernels judged from their machine code, and steps traced as they run."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from softkv.console import err, fail, friendly, out

app = typer.Typer(
    help="What kernels and steps cost: static bounds from machine code, traces of real runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class TargetName(str, Enum):
    SM_80 = "sm_80"
    SM_90 = "sm_90"
    SM_100 = "sm_100"
    SM_120 = "sm_120"
    GFX942 = "gfx942"


@app.command(
    epilog="Examples:\n\n    softkv profile static --target sm_90\n\n"
    "    softkv profile static mine.py:kernel --signature '*bf16,*bf16,i32' --constexprs BLOCK=128 --target sm_90"
)
@friendly
def static(
    kernel: Annotated[
        str | None, typer.Argument(help="path.py:kernel, a kernel of your own; without it softkv's and its peers'.")
    ] = None,
    target: Annotated[list[TargetName] | None, typer.Option(help="Repeat for several; all without it.")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Head dims.  [default: 128]", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    only: Annotated[str | None, typer.Option(help="Kernels whose name holds this: forward, dq, dkv, decode…")] = None,
    signature: Annotated[str, typer.Option(help="Your kernel's types, in order: *bf16,*fp32,i32,i32:16,fp32.")] = "",
    constexprs: Annotated[str, typer.Option(help="Your kernel's constants: BLOCK_M=128,CAUSAL=True.")] = "",
    num_warps: Annotated[int, typer.Option(help="Your kernel's warps.")] = 4,
    num_stages: Annotated[int, typer.Option(help="Your kernel's pipeline stages.")] = 2,
    scores: Annotated[
        int | None, typer.Option(help="Query × key pairs of a pass of your kernel's loop, such as BLOCK_M·BLOCK_N.")
    ] = None,
    loops: Annotated[bool, typer.Option("--loops", help="Show the instruction mix of every loop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: every loop's mix and cycles, and the rates.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write the table as an HTML page, too.")] = None,
) -> None:
    """Judge kernels without a GPU: registers, memories, occupancy, spills, and bounds from the machine code.

    Bounds are static: fractions of the tensor peak that the instructions allow, never a measured time."""
    from softkv.kernels.launch import interpreter_enabled

    if interpreter_enabled():
        fail("TRITON_INTERPRET is set, and the interpreter has nothing to compile: unset it")
    import triton

    from softkv.profiling import static as judge
    from softkv.profiling import user_kernel

    targets = [one.value for one in (target or TargetName)]
    if dtype not in judge.DTYPES:
        fail(f"--dtype expects {' or '.join(judge.DTYPES)}, got {dtype!r}")
    if kernel is None:
        if signature or constexprs:
            fail("--signature and --constexprs describe a kernel of your own: give path.py:kernel")
        subjects = judge.own(targets, dim or [128], dtype)
    else:
        subjects = user_kernel.subjects(kernel, signature, constexprs, targets, num_warps, num_stages, scores)
    rows = []
    with err.status("compiling…") as status:
        for subject in subjects:
            if only is None or only in subject.kernel:
                status.update(f"compiling {escape(subject.source)} {escape(subject.kernel)} for {subject.target}")
                rows.append(judge.judge(subject))
    rows = judge.ordered(rows)
    content = {"triton": triton.__version__, "rates": judge.rates(), "rows": rows}
    if as_json:
        print(json.dumps(content, indent=1))
        return
    _show(rows, loops, html)


def _show(rows: list[dict[str, Any]], loops: bool, html: Path | None) -> None:
    import io

    import triton
    from rich.console import Console

    from softkv.profiling import static as judge
    from softkv.profiling.files import write_whole

    table = Table(*judge.HEADINGS, title=f"Static bounds, triton {triton.__version__}", title_justify="left")
    for column in table.columns[4:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, judge.cells(row)))
    page = Console(record=True, width=260, file=io.StringIO())
    for console in (out, page):
        console.print(table)
        console.print(NOTE)
        if loops:
            console.print(_mixes(rows))
    if html is not None:
        write_whole(html, page.export_html())


NOTE = """\
Cycles of one multiprocessor for one tile, by pipe. overlap: all hides behind the fullest pipe; serial: matrix work
and arithmetic take turns; fractions of the tensor peak (*: matrix work from the tile's size, not from the binary).
work: matrix products done for each that is needed. exp, instr/score: exponentials and instructions a lane for one
query and key. Nothing here is a measured time."""


def _mixes(rows: list[dict[str, Any]]) -> Table:
    headings = ("kernel", "target", "loop", "warps", "instructions", "by pipe", "opcodes")
    table = Table(*headings, title="Loops", title_justify="left")
    for row in rows:
        for i, loop in enumerate(row["loops"]):
            name = f"{i} {loop['partition'] or ''} {'(hot)' if loop['hot'] else ''}"
            mix, opcodes = (", ".join(f"{n} {what}" for what, n in loop[key].items()) for key in ("mix", "opcodes"))
            counts = str(loop["warps"]), str(loop["instructions"])
            table.add_row(row["kernel"], row["target"], name, *counts, mix, opcodes)
    return table
