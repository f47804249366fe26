"""The compile matrix (`python -m softkv.profiling.matrix`): every kernel compiled for every target and analysed; stored
as JSON and as a page.

Each row is written as soon as it is ready, with a hash of its inputs (kernel source, signature, tile, target, triton,
and the analysis code), so that an interrupted run resumes and changed rows are recomputed.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from softkv.kernels.launch import Recorded, interpreter_enabled
from softkv.kernels.tiles import block_d
from softkv.profiling import instructions, loops, machines, sass
from softkv.profiling.compile import (
    COMMON,
    DTYPES,
    MATRIX_PASSES,
    OTHERS,
    TARGETS,
    TRAINER,
    CallKind,
    judge,
    label,
    matrix,
    record,
    specialise,
)
from softkv.profiling.files import write_whole
from softkv.profiling.instructions import MATRIX_KIND
from softkv.profiling.machines import MACHINES

DIMS = (64, 80, 128, 256)
PlanPart = tuple[tuple[CallKind, ...], tuple[int, ...], tuple[torch.dtype, ...]]
# A flag changes edges and addresses, not products: beyond the common calls, one dtype and one or two head dims suffice.
QUICK: tuple[PlanPart, ...] = ((COMMON, (64, 128), (torch.bfloat16,)),)
PLAN: tuple[PlanPart, ...] = (
    *QUICK,
    (COMMON, (80, 256), (torch.bfloat16,)),
    (COMMON, DIMS, (torch.float16,)),
    (OTHERS, (128,), (torch.bfloat16,)),
    (TRAINER, (64, 128), (torch.bfloat16,)),
    (COMMON, (64, 128, 256), (torch.float32,)),
)
COLUMNS = (
    "tile", "registers", "stack", "shared", "occupancy", "spills", "edge_spills", "selects", "work", "serial",
    "overlap",
)  # fmt: skip
HEAD = f"| kernel | case | target | D | dtype | {' | '.join(COLUMNS)} | problems |\n|" + "---|" * (6 + len(COLUMNS))


def problems(key: str, row: dict[str, Any]) -> list[str]:
    """The problems of a binary; empty if there are none."""
    kernel, _, target, head_dim, dtype = key.split(" | ")
    found = []
    if row["shared"] > MACHINES[target].shared_limit:
        found.append(f"{row['shared']} bytes of shared memory, {MACHINES[target].shared_limit} allowed")
    if row["atomics"]:
        found.append("atomics")
    if dtype == "fp32":  # its products may run on the FP32 lanes
        return found
    if row["spills"] and int(head_dim) <= 128:
        found.append(f"{row['spills']} spills in full-tile loops")
    if kernel.split()[0] not in MATRIX_PASSES:
        return found
    own, step, warps, _ = row["tile"]
    one_a_score = own * step // (warps * MACHINES[target].lanes)
    if row["selects"] >= one_a_score and block_d(int(head_dim)) == int(head_dim):
        found.append(f"{row['selects']} selects in full-tile loops")
    if not row["matrix"]:
        found.append("no loop with matrix instructions")
    if own >= 64 and any(MATRIX_KIND[target] not in kind for kind in row["matrix"]):
        found.append(f"matrix instructions are {', '.join(row['matrix'])}, not {MATRIX_KIND[target]}")
    return found


@cache
def _reader() -> bytes:
    """The source of the code that analyses binaries."""
    modules = (sass, loops, instructions, machines)
    return b"".join(Path(str(one.__file__)).read_bytes() for one in modules) + inspect.getsource(judge).encode()


def _made_from(launch: Recorded, target: str) -> str:
    source = specialise(launch.kernel, launch.arguments, target)
    made_from = (source.hash(), launch.tile[:4], target, triton.__version__)
    return hashlib.sha256(repr(made_from).encode() + _reader()).hexdigest()[:16]


def wanted(plan: Iterable[PlanPart], targets: Sequence[str]) -> dict[str, str]:
    """Hashes of a plan's binaries, by name."""
    sources: dict[str, str] = {}
    for cases, dims, dtypes in plan:
        for key, launch, target, _ in matrix(cases, targets, dims, dtypes):
            if (source := _made_from(launch, target)) not in sources.values():
                sources[key] = source
    return sources


def _make(key: str) -> dict[str, Any]:
    kernel, name, target, head_dim, dtype = key.split(" | ")
    case = next(case for case in (*COMMON, *TRAINER, *OTHERS) if case.name == name)
    launches = record(case, target, int(head_dim), next(x for x, short in DTYPES.items() if short == dtype))
    return judge(next(launch for launch in launches if label(launch) == kernel), target, int(head_dim))


def make(keys: Sequence[str], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compile and analyse with `jobs` processes; rows in order of completion."""
    if jobs == 1 or len(keys) <= 1:
        yield from ((key, _make(key)) for key in keys)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_make, key): key for key in keys}
        for done in as_completed(running):
            yield running[done], done.result()


def line(key: str, row: dict[str, Any]) -> str:
    cells = {name: str(row[name]) for name in COLUMNS}
    if not row["matrix"]:
        cells["work"] = cells["serial"] = cells["overlap"] = "–"
    own, step, warps, stages = row["tile"]
    cells["tile"] = f"{own}×{step}, {warps}w {stages}s"
    cells["occupancy"] += f" ({row['limit']})"
    return f"| {key} | {' | '.join(cells.values())} | {'; '.join(problems(key, row)) or '–'} |"


def page(rows: dict[str, dict[str, Any]], planned: int) -> str:
    """The page for the binaries compiled so far, out of `planned`."""
    bad = sum(bool(problems(key, row)) for key, row in rows.items())
    spilling = sorted(key for key, row in rows.items() if row["spills"] or row["edge_spills"])
    text = [
        f"Kernels compiled offline for each target with triton {triton.__version__}: {len(rows)} of {planned} "
        f"binaries, {bad} with a problem.",
        "Generated by `make compile-matrix`; method in [kernels.md](kernels.md). `spills`, `selects`: in full-tile",
        "loops; `edge_spills`: in the loops that mask. `serial`, `overlap`: the worse full-tile loop. `work`: matrix",
        "products done for each one needed; bounds count the needed ones.",
        "",
        f"Spills inside a loop of matrix products are left in {len(spilling)} binaries:",
        "",
        *(f"- {key}: {rows[key]['spills']} in full tiles, {rows[key]['edge_spills']} in edges" for key in spilling),
        "",
        HEAD,
        *(line(key, rows[key]) for key in sorted(rows)),
    ]
    return "\n".join(text) + "\n"


def _save(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    write_whole(path, f'{{"triton": {json.dumps(triton.__version__)}, "rows": {{\n{lines}\n}}}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--all", action="store_true", help="every case of PLAN, not just the common ones at D = 64 and 128"
    )
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--write", metavar="FILE", type=Path, help="JSON file of results; current rows are kept")
    parser.add_argument("--table", metavar="FILE", type=Path, help="also write a Markdown page")
    options = parser.parse_args()
    if interpreter_enabled():
        parser.error("unset TRITON_INTERPRET: the interpreter has nothing to compile")
    kept: dict[str, dict[str, Any]] = {}
    if options.write and options.write.exists():
        kept = json.loads(options.write.read_text())["rows"]
    sources = wanted(PLAN if options.all else QUICK, options.target)
    rows = {key: kept[key] for key, source in sources.items() if kept.get(key, {}).get("source") == source}
    others = {key: row for key, row in kept.items() if key not in sources and key.split(" | ")[2] not in options.target}
    print(HEAD, *(line(key, row) for key, row in rows.items()), sep="\n", flush=True)
    for key, row in make([key for key in sources if key not in rows], options.jobs):
        rows[key] = row | {"source": sources[key]}
        print(line(key, rows[key]), flush=True)
        if options.write:
            _save(options.write, others | rows)
    if options.table:
        write_whole(options.table, page(others | rows, len(wanted(PLAN, list(TARGETS)))))
    return any(problems(key, row) for key, row in rows.items())


if __name__ == "__main__":
    sys.exit(main())
