"""Analyse kernels without a GPU: compile them offline and read their machine code (method: `softkv.profiling.sass`).

A `Candidate` is one kernel as a launcher would launch it. softkv's own come from its launchers, run on meta tensors;
peers and a user's kernel go through the same compiler options and the same analysis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources

from softkv import __version__
from softkv.profiling.compile import COMMON, MATRIX_PASSES, PRODUCTS, TARGETS, build, matrix, name_of, specialise
from softkv.profiling.instructions import EXPONENTIAL, MATRIX, PIPES
from softkv.profiling.loops import Loop, overlap, serial
from softkv.profiling.machines import MACHINES
from softkv.profiling.sass import Report, analyse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_OPCODES = 12  # of a loop, in JSON


@dataclass(frozen=True)
class Candidate:
    source: str  # package and version
    kernel: str
    case: str
    target: str
    head_dim: int | None
    dtype: str
    tile: str
    compile: Callable[[], Any]
    scores: int | None  # query × key pairs of one pass of the hot loop; None if unknown, or if there are none
    products: int = 0  # matrix products per score: 2·products·D FLOP


def own(targets: list[str], dims: list[int], dtype: str) -> Iterator[Candidate]:
    """softkv's kernels, in the cases that differ most: training over a shared prefix, and decoding."""
    for key, launch, target, head_dim in matrix(COMMON, targets, dims, [DTYPES[dtype]]):
        kernel, case = key.split(" | ")[:2]
        tile, name = launch.tile, name_of(launch)
        yield Candidate(
            source=f"softkv {__version__}",
            kernel=kernel,
            case=case,
            target=target,
            head_dim=head_dim,
            dtype=dtype,
            tile=f"{tile.own}×{tile.step}, {tile.warps}w {tile.stages}s",
            compile=partial(build, launch, target),
            scores=tile.own * tile.step if name in MATRIX_PASSES else None,
            products=PRODUCTS.get(name, 0),
        )


def compile_kernel(kernel: Any, arguments: dict[str, Any], target: str, warps: int, stages: int) -> Any:
    """Compile a `@triton.jit` function as its launcher would with these arguments: tensors on the meta device, numbers,
    and constexprs."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(specialise(kernel, arguments, target), target=TARGETS[target][0], options=options)


def judge(subject: Candidate) -> dict[str, Any]:
    """Compile a subject and analyse its binary: a row of the table, with the instruction mix of each loop.

    `work`: matrix work done relative to what attention needs; above 1 if warps repeat each other's products or a head
    dim is padded. Bounds count the needed work."""
    report = analyse(subject.compile(), subject.target)
    if subject.scores and subject.head_dim:
        for loop in report.path:
            if loop.count(MATRIX) and not loop.shapes:
                loop.flops = 2 * subject.products * subject.head_dim * subject.scores
    cycles = report.cycles
    done, needed = sum(loop.matrix_flops for loop in report.path), 0.0
    if subject.scores and subject.head_dim:
        needed = 2 * subject.products * subject.head_dim * subject.scores
    work = done / needed if needed else None
    bounds = {"overlap": overlap(cycles), "serial": serial(cycles)} if done else {}
    return {
        **{key: value for key, value in vars(subject).items() if key not in ("compile", "products")},
        "registers": report.registers,
        "stack": report.stack,
        "spills": report.spills,
        "spills_in_loops": report.spills_in_loops,
        "shared": report.shared,
        "tensor_columns": report.tensor_columns,
        "occupancy": report.occupancy,
        "limit": report.limit,
        "warps": report.warps,
        "partitions": report.partitions,
        "cycles": {pipe: round(count) for pipe, count in cycles.items()},
        "work": round(work, 3) if work else None,
        **{name: round(bounds[name] / (work or 1), 3) if bounds else None for name in ("overlap", "serial")},
        "derived": any(loop.derived for loop in report.path),
        **_per_score(report, subject.scores),
        "loops": [_loop(loop, loop in report.path) for loop in report.loops],
    }


def best(subjects: list[Candidate]) -> tuple[dict[str, Any] | None, list[str]]:
    """(the row with the best serial bound, the failures) among one kernel's configurations.

    A subject that does not compile raises only if it is softkv's or the user's own."""
    rows, failures = [], []
    for subject in subjects:
        try:
            rows.append(judge(subject))
        except (CompilationError, OutOfResources, RuntimeError) as error:
            if subject.case != "causal" or subject.source.startswith("softkv"):
                raise DoesNotCompile(f"{subject.kernel} does not compile for {subject.target}: {why(error)}") from error
            failures.append(f"{subject.source}: {subject.kernel} does not compile for {subject.target}: {why(error)}")
    return max(rows, key=lambda row: row["serial"] or 0, default=None), failures


class DoesNotCompile(ValueError):
    """A one-line compile error."""


def why(error: BaseException) -> str:
    """The compiler's message and its place in the kernel."""
    places = []
    while True:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        places += [line.rstrip(":") for line in lines[:1] if re.fullmatch(r"at \d+:\d+:", line)]
        if error.__cause__ is None:
            break
        error = error.__cause__
    said = lines[-1] if lines else type(error).__name__
    if not places:
        return said
    line, column = places[-1].removeprefix("at ").split(":")
    return f"{said} (line {line}, column {column} of the function)"


def _per_score(report: Report, scores: int | None) -> dict[str, float | None]:
    if not scores:
        return {"exponentials_per_score": None, "instructions_per_score": None}
    lanes = 64 if report.target.startswith("gfx") else 32
    exponentials = sum(loop.count(EXPONENTIAL) * loop.warps for loop in report.path) * lanes
    instructions = sum(len(loop.instructions) * loop.warps for loop in report.path) * lanes
    return {
        "exponentials_per_score": round(exponentials / scores, 3),
        "instructions_per_score": round(instructions / scores, 2),
    }


def _loop(loop: Loop, hot: bool) -> dict[str, Any]:
    return {
        "hot": hot, "partition": loop.partition or None, "warps": loop.warps, "instructions": len(loop.instructions),
        "mix": loop.mix, "opcodes": dict(loop.opcodes.most_common(MOST_OPCODES)),
        "cycles": {pipe: round(cycles) for pipe, cycles in loop.cycles().items()},
    }  # fmt: skip


def rates() -> list[dict[str, Any]]:
    """The rates used for bounds, one row per target."""
    return [{"target": target, **asdict(machine)} for target, machine in MACHINES.items()]


HEADINGS = (
    "kernel", "target", "D", "tile", "registers", "stack, spills", "shared KiB", "tmem", "programs",
    "cycles: " + "/".join(PIPES), "work", "overlap", "serial", "exp/score", "instr/score",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row in the table."""
    mark = "*" if row["derived"] else ""
    scores = (row["exponentials_per_score"], row["instructions_per_score"])
    return [
        f"{row['source'].split()[0]}: {row['kernel']}",
        row["target"],
        str(row["head_dim"] or "–"),
        row["tile"],
        str(row["registers"]),
        f"{row['stack']}, {row['spills']}",
        f"{row['shared'] / 1024:.0f}",
        str(row["tensor_columns"] or "–"),
        f"{row['occupancy']} ({row['limit']})",
        "/".join(str(row["cycles"][pipe]) for pipe in PIPES) if row["cycles"] else "–",
        "–" if row["work"] is None else f"{row['work']:.2f}",
        *("–" if bound is None else f"{bound:.2f}{mark}" for bound in (row["overlap"], row["serial"])),
        *("–" if count is None else f"{count:.2f}" for count in scores),
    ]


def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by target, head dim and pass, with softkv first."""
    passes = [*MATRIX_PASSES, "prepare", "merge", "add_parts"]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        known = (i for i, name in enumerate(passes) if row["kernel"].startswith(name))
        target, head_dim = list(TARGETS).index(row["target"]), row["head_dim"] or 0
        return target, head_dim, next(known, len(passes)), not row["source"].startswith("softkv"), row["kernel"]

    return sorted(rows, key=place)
