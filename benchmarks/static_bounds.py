"""Static bounds as the docs show them: softkv's kernels, and beside its peers'. They are no times.

`results/static.json` is what `softkv profile static --json` printed with the peers installed,
`results/compile_matrix.json` what `make compile-matrix` wrote.
"""

from __future__ import annotations

from typing import Any

from .results import FOLDER, read_json

HOW = """\
`softkv profile static`: triton {triton}, D = {dims}, {dtype}; compiled offline, read from machine code, not measured.

| pass | target | kernels of | tile | registers | spills | programs | work | overlap | serial | exp / score |
|---|---|---|---|---:|---:|---|---:|---:|---:|---:|
{rows}
"""


KERNELS = """\
Triton {triton}, bf16, causal over a shared prefix (`make compile-matrix`).

| pass | target | D | tile, warps, stages | registers | programs | work | serial | overlap |
|---|---|---:|---|---:|---:|---:|---:|---:|
{rows}
"""


def kernels() -> str:
    content = read_json(FOLDER / "compile_matrix.json")
    lines = []
    for kernel in ("forward", "dq", "dkv", "dkv over the prefix"):
        for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
            for dim in (64, 128, 256):
                row = content["rows"][f"{kernel} | causal, shared prefix | {target} | {dim} | bf16"]
                own, step, warps, stages = row["tile"]
                cells = (kernel, target, dim, f"{own}×{step}, {warps}, {stages}", row["registers"], row["occupancy"])
                bounds = (f"{row[name]:.2f}" for name in ("work", "serial", "overlap"))
                lines.append(f"| {' | '.join(map(str, (*cells, *bounds)))} |")
    return KERNELS.format(triton=content["triton"], rows="\n".join(lines))


def table() -> str:
    content = read_json(FOLDER / "static.json")
    rows = [row for row in content["rows"] if row["serial"] is not None]
    first = rows[0]
    dims = ", ".join(str(dim) for dim in sorted({row["head_dim"] for row in rows}))
    lines = "\n".join(map(_line, sorted(rows, key=_place)))
    return HOW.format(triton=content["triton"], dims=dims, dtype=first["dtype"], rows=lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    passes = ("forward", "dq", "dkv", "backward", "decode")
    return (
        passes.index(row["kernel"].split()[0]),
        row["target"],
        not row["source"].startswith("softkv"),
        row["source"],
        row["kernel"],
    )


def _line(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    cells = (
        row["kernel"],
        row["target"],
        row["source"],
        row["tile"],
        row["registers"],
        row["spills_in_loops"],
        f"{row['occupancy']} ({row['limit']})",
        *(number(row[key]) for key in ("work", "overlap", "serial", "exponentials_per_score")),
    )
    return f"| {' | '.join(map(str, cells))} |"
