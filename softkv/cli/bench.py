"""`softkv bench`: softkv compared with what it replaces, on this machine. The benchmarks are in `softkv.benchmarks`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softkv.cli.console import err, fail, friendly, out

if TYPE_CHECKING:
    from softkv.benchmarks.tables import Grid

app = typer.Typer(
    help="Compare softkv with what it replaces, on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class DeviceName(str, Enum):
    CPU = "cpu"
    CUDA = "cuda"


Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the results; results of other cases in it are kept.")
]
Cases = Annotated[list[str] | None, typer.Option("--case", help="Cases to run, by name; * matches anything.")]
OnlyList = Annotated[bool, typer.Option("--list", help="Print the names of the cases.")]
OnDevice = Annotated[DeviceName, typer.Option(help="cuda selects the large sweep.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes: a smoke test, not a measurement.")]
FOLDER = Path("runs/bench")


@app.command()
@friendly
def attention(
    case: Cases = None,
    device: OnDevice = DeviceName.CPU,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Custom shapes instead of the sweep's: B=8,H=32,G=8,T=2048,P=128,D=128."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Time for each case's samples.")] = None,
    output: Output = FOLDER,
    quick: Quick = False,
    only_list: OnlyList = False,
) -> None:
    """The op: time, memory, share of the machine's peak, and scaling.

    Custom shapes are measured forward and forward + backward; with T=1 as decoding, with S=… cached tokens."""
    from dataclasses import replace

    from softkv.benchmarks import attention as benchmark
    from softkv.benchmarks import figures
    from softkv.benchmarks.shapes import cases, of_user

    sweeps = of_user(shape) if shape else benchmark.sweeps(device.value, quick)
    known = {one.name: one for one in cases(sweeps)}
    chosen = [known[name] for name in _chosen(list(known), case, only_list)]
    settings = benchmark.AttentionSettings.of(device.value, quick)
    if seconds is not None:
        settings = replace(settings, seconds=seconds)
    records = benchmark.run(chosen, settings, _command(), quick)
    results = _collect("attention", records, output, list(known))
    for mode, mean in figures.geometric_means(results).items():
        out.print(f"geometric mean over the training shapes, {mode}: {mean:.2f}× cat")


@app.command()
@friendly
def train(
    case: Cases = None,
    device: OnDevice = DeviceName.CPU,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each provider.")] = 3,
    output: Output = FOLDER,
    quick: Quick = False,
    only_list: OnlyList = False,
) -> None:
    """A training step on SmolLM2-135M-Instruct, compared with PEFT and with the floor."""
    from softkv.benchmarks import train as benchmark
    from softkv.benchmarks.model_jobs import ModelSettings

    known = benchmark.cases(device.value, quick)
    chosen = {name: known[name] for name in _chosen(list(known), case, only_list)}
    settings = ModelSettings.of(device.value, quick)
    records = benchmark.run(chosen, steps, settings, _command(), _progress(steps))
    _collect("train", records, output, list(known))


@app.command()
@friendly
def generate(
    case: Cases = None,
    device: OnDevice = DeviceName.CPU,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each provider.")] = 3,
    output: Output = FOLDER,
    quick: Quick = False,
    only_list: OnlyList = False,
) -> None:
    """Generation after a long shared prefix on SmolLM2-135M-Instruct, compared with PEFT and with no prefix."""
    from softkv.benchmarks import generate as benchmark
    from softkv.benchmarks.model_jobs import ModelSettings

    known = benchmark.cases(device.value, quick)
    chosen = {name: known[name] for name in _chosen(list(known), case, only_list)}
    settings = ModelSettings.of(device.value, quick)
    records = benchmark.run(chosen, rounds, settings, _command(), _progress(rounds))
    _collect("generate", records, output, list(known))


@app.command()
@friendly
def adapters(
    case: Cases = None,
    device: OnDevice = DeviceName.CPU,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each case's samples; three rounds at least.")] = 4.0,
    output: Output = FOLDER,
    quick: Quick = False,
    only_list: OnlyList = False,
) -> None:
    """A batch with 1 to 16 different adapters, compared with one adapter after another, also in PEFT."""
    from softkv.benchmarks import adapters as benchmark
    from softkv.benchmarks.model_jobs import ModelSettings

    known = benchmark.cases(quick)
    chosen = {name: known[name] for name in _chosen(list(known), case, only_list)}
    settings = ModelSettings.of(device.value, quick)
    _collect("adapters", benchmark.run(chosen, seconds, settings, _command()), output, list(known))


@app.command()
@friendly
def gpu(
    minutes: Annotated[float, typer.Option(min=0.1, help="Total time.")] = 9.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("runs/gpu"),
    part: Annotated[list[str] | None, typer.Option("--part", help="Only these parts, by name.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile and test. [default: cores, at most 16]")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Repeat the measurements of earlier runs.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Tiny jobs on a CPU with interpreted kernels: a smoke test."),
    ] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Print the names of the parts.")] = False,
) -> None:
    """Correctness, times, whole models and tiles on a GPU, in ten minutes. Resumes where it stopped."""
    from softkv.benchmarks.gpu import PARTS
    from softkv.benchmarks.gpu.__main__ import settings_of
    from softkv.benchmarks.gpu.conductor import conduct

    names = [one.name for one in PARTS]
    if only_list:
        out.print("\n".join(f"{one.name}: {one.title}" for one in PARTS))
        return
    if unknown := [name for name in part or [] if name not in names]:
        fail(f"--part expects one of {', '.join(names)}, got {unknown[0]!r}")
    settings = settings_of(quick, processes or min(os.cpu_count() or 1, 16))
    print(conduct(settings, output, minutes, part or [], again, say=lambda line: print(line, flush=True)))


@app.command()
@friendly
def report(output: Output = FOLDER) -> None:
    """Regenerate the plots and report.html from the results in a folder."""
    from softkv.benchmarks import report

    if not any(output.glob("*.json")):
        fail(f"{output} contains no results: run softkv bench attention, train or generate first")
    out.print(f"report: {report.write(output)}")


def _collect(name: str, records: Iterable[tuple[str, Any]], folder: Path, known: list[str]) -> dict[str, Any]:
    """Print each record and add it to the benchmark's file, then write the report."""
    from softkv.benchmarks import report
    from softkv.benchmarks.results import merge
    from softkv.benchmarks.tables import GRIDS

    wide, results = Console(width=max(out.width, 118), highlight=False), {}
    for case, record in records:
        results[case] = record
        merge(folder / f"{name}.json", {case: record}, known)
        _print(wide, GRIDS[name](case, record))
    out.print(f"report: {report.write(folder)}")
    return results


def _print(console: Console, grid: Grid) -> None:
    table = Table(*(escape(column) for column in grid.columns[:1]), title=escape(grid.title), title_justify="left")
    for column in grid.columns[1:]:
        table.add_column(escape(column), justify="right")
    for row in grid.rows:
        table.add_row(*map(escape, row))
    console.print(table, *map(escape, grid.notes), sep="\n")


def _progress(rounds: int) -> Callable[[int], None]:
    return lambda number: err.print(f"  round {number} of {rounds}", end="\r")


def _chosen(known: list[str], patterns: list[str] | None, only_list: bool) -> list[str]:
    names = [name for name in known if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        fail(f"no case is called {', '.join(patterns or [])}: softkv bench ... --list names them")
    if only_list:
        out.print("\n".join(names))
        raise typer.Exit()
    return names


def _command() -> str:
    return shlex.join(["softkv", *sys.argv[1:]])
