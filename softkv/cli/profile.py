"""`softkv profile …`: static analysis of kernels, traces of real steps, host time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from softkv.cli.console import err, fail, friendly, out
from softkv.cli.options import MethodName
from softkv.cli.units import in_bytes

app = typer.Typer(
    help="Costs of kernels and steps: static bounds from machine code, traces of real runs.",
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
        str | None, typer.Argument(help="path.py:kernel, your own kernel; default: softkv's and peers'.")
    ] = None,
    target: Annotated[list[TargetName] | None, typer.Option(help="Repeat for several.  [default: all]")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Head dims.  [default: 128]", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16.")] = "bf16",
    only: Annotated[
        str | None, typer.Option(help="Kernels whose name contains this: forward, dq, dkv, decode…")
    ] = None,
    signature: Annotated[
        str, typer.Option(help="Your kernel's types, in order: *bf16,*fp32,i32,i32:16,fp32,tensordesc<bf16[128,64]>.")
    ] = "",
    constexprs: Annotated[str, typer.Option(help="Your kernel's constants: BLOCK_M=128,CAUSAL=True.")] = "",
    num_warps: Annotated[int, typer.Option(min=1, help="Your kernel's warps.")] = 4,
    num_stages: Annotated[int, typer.Option(min=1, help="Your kernel's pipeline stages.")] = 2,
    scores: Annotated[
        int | None,
        typer.Option(min=1, help="Query × key pairs per pass of your kernel's loop, such as BLOCK_M·BLOCK_N."),
    ] = None,
    with_peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Include other attention kernels.")] = True,
    loops: Annotated[bool, typer.Option("--loops", help="Show the instruction mix of every loop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: every loop's mix and cycles, and the rates.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the table as an HTML page.")] = None,
) -> None:
    """Analyse kernels without a GPU: registers, memory, occupancy, spills, and bounds from the machine code.

    Bounds are static: fractions of the tensor peak that the instructions allow, not measured times."""
    from softkv.kernels.launch import interpreter_enabled

    if interpreter_enabled():
        fail("unset TRITON_INTERPRET: the interpreter does not compile kernels")
    import triton

    from softkv.profiling import peers, user_kernel
    from softkv.profiling import static as judge

    targets = [one.value for one in (target or TargetName)]
    if dtype not in judge.DTYPES:
        fail(f"--dtype expects {' or '.join(judge.DTYPES)}, got {dtype!r}")
    if num_warps & (num_warps - 1):
        fail(f"--num-warps expects a power of 2, got {num_warps}")
    groups: Iterable[list[judge.Candidate]]
    notes: list[str] = []
    if kernel is None:
        if signature or constexprs:
            fail("--signature and --constexprs describe your own kernel: give path.py:kernel")
        groups = ([subject] for subject in judge.own(targets, dim or [128], dtype))
        if with_peers:
            groups = itertools.chain(groups, peers.subjects(targets, dim or [128], dtype))
            notes = peers.missing()
    else:
        own = user_kernel.subjects(kernel, signature, constexprs, targets, num_warps, num_stages, scores)
        groups = ([subject] for subject in own)
    rows, names = [], set()
    with err.status("compiling…") as status:
        for group in groups:
            names.add(group[0].kernel)
            if only is None or only in group[0].kernel:
                status.update(f"{escape(group[0].source)}: {escape(group[0].kernel)} for {group[0].target}")
                row, said = judge.best(group)
                rows += [] if row is None else [row]
                notes += said
    if only is not None and not any(only in name for name in names):
        fail(f"--only expects a part of a kernel's name ({', '.join(sorted(names))}), got {only!r}")
    rows = judge.ordered(rows)
    content = {"triton": triton.__version__, "rates": judge.rates(), "rows": rows, "notes": notes}
    if as_json:
        print(json.dumps(content, indent=1))
        return
    _show(rows, loops, html)
    for note in notes:
        out.print(escape(note), soft_wrap=True)


def _show(rows: list[dict[str, Any]], loops: bool, html: Path | None) -> None:
    import io

    import triton
    from rich.console import Console
    from rich.measure import Measurement

    from softkv.profiling import static as judge
    from softkv.profiling.files import write_whole

    table = Table(*judge.HEADINGS, title=f"Static bounds, triton {triton.__version__}", title_justify="left")
    for column in table.columns[4:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, judge.cells(row)))
    page = Console(record=True, width=WIDE, file=io.StringIO())
    here = out if out.is_terminal else Console(width=WIDE, highlight=False)
    for console in (here, page):
        if Measurement.get(console, console.options.update(max_width=WIDE), table).maximum <= console.width:
            console.print(table)
        else:
            for row in rows:
                console.print(_block(dict(zip(judge.HEADINGS, judge.cells(row), strict=True))))
        console.print(NOTE, width=min(console.width, 118))
        if loops:
            console.print(_mixes(rows))
    if html is not None:
        write_whole(html, page.export_html())


WIDE = 260
NOTE = (
    "Cycles of one multiprocessor for one tile, by pipe. overlap: all is hidden behind the busiest pipe; serial: "
    "matrix work and arithmetic alternate; fractions of the tensor peak (*: matrix work from the tile's size, not the "
    "binary). work: matrix products done for each one needed. exp, instr/score: exponentials and instructions per "
    "lane for one query and key. These are not measured times."
)


def _block(cells: dict[str, str]) -> str:
    """A row, if the terminal is too narrow for the table."""
    name = f"[bold]{escape(cells.pop('kernel'))}[/] for {cells.pop('target')}"
    return f"{name}: {'; '.join(f'{heading} {escape(cell)}' for heading, cell in cells.items())}\n"


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


class What(str, Enum):
    TRAIN = "train"
    GENERATE = "generate"


@app.command(
    epilog="Example:\n\n    softkv profile trace --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/trace"
)
@friendly
def trace(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hugging Face Hub id of the base.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for trace.json and memory.png.")],
    what: Annotated[What, typer.Option(help="Training steps, or one generation.")] = What.TRAIN,
    method: MethodName = "p-tuning-v2",
    length: Annotated[int, typer.Option("--length", "-P", min=1, help="Slots, or soft tokens.")] = 64,
    batch: Annotated[int, typer.Option("--batch", "-B", min=1, help="Rows of random tokens.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", "-T", min=2, help="Tokens per row.")] = 256,
    answer: Annotated[int, typer.Option(min=1, help="Labelled tokens per row.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Profiled training steps, after one that is not.")] = 2,
    new_tokens: Annotated[int, typer.Option(min=1, help="To generate.")] = 16,
    top: Annotated[int, typer.Option(min=1, help="Operations in the table.")] = 15,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda…; default: the accelerator, if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Trace real training steps or a generation: named ranges, top operations, a Chrome trace, memory over time."""
    if answer >= tokens:
        fail(f"--answer expects fewer than --tokens {tokens}, got {answer}")
    if output.exists() and not output.is_dir():
        fail(f"--output expects a folder, got the file {output}")

    import matplotlib.figure  # noqa: F401  (before the run, where it is missing)

    import softkv
    from softkv.cli.loading import load_model, on_device
    from softkv.methods import METHODS
    from softkv.profiling import trace as tracing

    base = on_device(load_model(model, dtype), device)
    soft_model = softkv.attach(base, METHODS[method].of_length(length))
    data = tracing.rows(soft_model, batch, tokens, answer)
    with err.status("running…"):
        if what is What.TRAIN:
            found = tracing.train(soft_model, data, batch, steps)
        else:
            found = tracing.generate(soft_model, data, new_tokens)
        content = tracing.write(found, output, soft_model.device.type)
    if as_json:
        print(json.dumps(content, indent=1))
        return
    on_accelerator = content["device"] != "cpu"
    time, own = ("device", "own_device") if on_accelerator else ("host", "own_host")
    for title, lines, key in (("Ranges", content["ranges"], time), ("Operations", content["operations"][:top], own)):
        table = Table("", "calls", "ms", "own ms", title=title, title_justify="left")
        table.columns[0].overflow = "fold"
        for column in table.columns[1:]:
            column.justify = "right"
        for line in sorted(lines, key=lambda line: -line[key]):
            table.add_row(escape(line["name"]), str(line["calls"]), f"{line[time]:.2f}", f"{line[own]:.2f}")
        out.print(table)
    out.print(f"peak above the start: {in_bytes(content['peak_bytes'])}")
    out.print(f"trace: {output / 'trace.json'} (ui.perfetto.dev)\nmemory: {output / 'memory.png'}", soft_wrap=True)


@app.command(epilog="Example:\n\n    softkv profile host --calls 1000")
@friendly
def host(
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU, if there is one.")] = None,
    calls: Annotated[int, typer.Option(min=15, help="Timed calls of each kind.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Host time of a call of the op by stage, compared with scaled_dot_product_attention.

    Without a GPU, the Triton engine runs with a driver that launches nothing."""
    import torch

    from softkv.profiling import host as measuring

    if device not in (None, "cpu", "cuda"):
        fail(f"--device expects cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda expects a CUDA or ROCm device: without one, --device cpu measures the host's part")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    records = [measuring.measure(mode, where, calls) for mode in measuring.MODES]
    if as_json:
        print(json.dumps(records, indent=1))
        return
    stages = list(records[0]["stages"])
    title = f"Microseconds of host time per call, {where}" + (", a driver that launches nothing" * (where == "cpu"))
    table = Table("", "softkv", *stages, "SDPA", "ratio", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in records:
        cells = [one["call"], *one["stages"].values(), one["sdpa"]]
        table.add_row(one["mode"], *(f"{cell:.1f}" for cell in cells), f"{one['ratio']:.2f}×")
    out.print(table)
