"""The tables of static bounds in the docs, for softkv's kernels and those of peers. They are not measured times.

`results/static.json` is the output of `softkv profile static --json` with the peers installed;
`results/static_published.json` is its output for the peers with published speeds, under a compiler that still supports
them (docs/profiling.md has the command); `results/compile_matrix.json` is written by `make compile-matrix`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .results import FOLDER, read_json

HOW = """\
`softkv profile static`: triton {triton}, D = {dims}, {dtype}; compiled offline, read from machine code, not measured.

| pass | target | kernels of | tile | registers | spills | programs | work | overlap | serial | exp / score |
|---|---|---|---|---:|---:|---|---:|---:|---:|---:|
{rows}
"""


PUBLISHED_HOW = """\
Forward without a mask, fp16 or bf16. Bounds: `softkv profile static`, triton {triton}.

| kernel | device | rows × heads × tokens × D | published TFLOP/s | of the peak | serial bound | overlap bound | measured of serial | source |
|---|---|---|---:|---:|---:|---:|---:|---|
{rows}
"""  # noqa: E501


@dataclass(frozen=True)
class Published:
    """A speed that others measured and published.

    Attributes:
        target: of the device; its peak is what `softkv.profiling.machines` quotes.
        shape: rows × heads × tokens × head dim; "" where the best of many is reported.
        package: whose forward kernel it is, where one that compiles is known.
    """

    kernel: str
    device: str
    target: str
    shape: str
    teraflops: float
    source: str
    url: str
    package: str | None = None


PUBLISHED = (
    Published(
        "Triton tutorial's fused attention, by block pointers", "H100", "sm_90", "128 × 8 × 16384 × 128", 420.122,
        "pytorch/benchmark 2296", "https://github.com/pytorch/benchmark/pull/2296", package="flash-attn-triton",
    ),
    Published(
        "FlashAttention-3, best", "H100", "sm_90", "", 740, "arXiv 2407.08608", "https://arxiv.org/abs/2407.08608",
    ),
    Published(
        "Triton, warp-specialised, persistent", "B200 (750 W)", "sm_100", "4 × 32 × 16384 × 128", 822.504,
        "facebookexperimental/triton 407", "https://github.com/facebookexperimental/triton/pull/407",
    ),
    Published(
        "FlashAttention-4, best", "B200", "sm_100", "", 1613, "arXiv 2603.05451", "https://arxiv.org/abs/2603.05451",
    ),
)  # fmt: skip


def published() -> str:
    content = read_json(FOLDER / "static_published.json")
    peaks = {rates["target"]: rates["teraflops"] for rates in content["rates"]}
    lines = []
    for one in PUBLISHED:
        share, bounds = one.teraflops / peaks[one.target], ["–", "–", "–"]
        if one.package is not None:
            row = bound_of(one, content["rows"])
            bounds = [f"{bound:.2f}" for bound in (row["serial"], row["overlap"], share / row["serial"])]
        cells = (one.kernel, one.device, one.shape or "–", f"{one.teraflops:.0f}", f"{share:.2f}", *bounds)
        lines.append(f"| {' | '.join(cells)} | [{one.source}]({one.url}) |")
    return PUBLISHED_HOW.format(triton=content["triton"], rows="\n".join(lines))


def bound_of(one: Published, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the binary that was measured: of its package's forward kernel, for its device."""
    (row,) = (
        row
        for row in rows
        if (row["source"].split()[0], row["kernel"], row["target"]) == (one.package, "forward", one.target)
    )
    return row


KERNELS = """\
Triton {triton}, bf16, causal over a shared prefix (`make compile-matrix`).

| pass | target | D | tile, warps, stages | registers | programs | work | serial | overlap |
|---|---|---:|---|---:|---:|---:|---:|---:|
{rows}
"""


def kernels() -> str:
    content = read_json(FOLDER / "compile_matrix.json")
    lines = []
    for kernel in ("forward", "dq", "dkv"):
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
