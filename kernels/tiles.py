"""Tile sizes, warps and pipeline stages: one table, with a reason for each row.

A program owns `own` items (query tokens × heads of a group) and processes `step` keys at a time; in "dkv" it owns keys
and processes items. "dkv_prefix" does the same and shares dkv's launch and warps (without a row of its own, it uses
dkv's). Measured rows give device and date. All others are static: their figures are bounds derived from binaries
(`softkv.profiling.sass`), bf16, full-tile loops. docs/kernels.md lists the alternatives tried, and why the bounds do
not rank tiles.
"""

from collections import UserDict
from typing import NamedTuple

import torch


class Target(NamedTuple):
    arch: str  # sm_80, sm_90, sm_100, sm_120, gfx942, or "interpreter"
    units: int  # multiprocessors, or compute units


class Tile(NamedTuple):
    own: int
    step: int
    warps: int
    stages: int
    why: str

    @property
    def edge(self) -> int:
        """The step of masked tiles: half, which leaves registers for compares and bounds, and wastes less work on
        hidden scores."""
        return max(16, self.step // 2)


MEASURED_ON = "measured, H200, 2026-11-26"  # each pass alone, bf16, triton 3.6
SMALL = "small and unequal: edges are met often, and swapped axes are seen"
INTERPRETER = {
    "forward": Tile(32, 32, 1, 1, SMALL),
    "decode": Tile(16, 32, 1, 1, SMALL),
    "decode_prefix": Tile(32, 32, 1, 1, SMALL),
    "merge": Tile(16, 1, 1, 1, SMALL),
    "prepare": Tile(16, 1, 1, 1, SMALL),
    "dq": Tile(32, 32, 1, 1, SMALL),
    "dkv": Tile(16, 64, 1, 1, SMALL),
    "dkv_prefix": Tile(32, 32, 1, 1, SMALL),
    "add_parts": Tile(64, 1, 1, 1, SMALL),
}

ONE_PASS = "memory bound, one pass: enough rows to fill 128-byte lines, few registers"
SKINNY = "memory bound: 16 items are the least a matrix instruction takes; 4 warps share the columns"
BATCHED = "64 items of the whole batch: a warp group's own matrix instruction"
EVERYWHERE = {
    "merge": Tile(16, 1, 4, 1, ONE_PASS),
    "prepare": Tile(32, 1, 4, 1, ONE_PASS),
    "add_parts": Tile(1024, 1, 4, 1, ONE_PASS),
}

# (pass, architecture) → largest padded head dim that a row applies to → row.
TABLE: dict[tuple[str, str], dict[int, Tile]] = {
    ("forward", "sm_80"): {
        64: Tile(
            128, 64, 4, 2, "32 rows a warp: key fragments are read from shared memory half as often as with 8 warps"
        ),
        128: Tile(128, 32, 4, 2, "as D = 64: overlap bound 1.0 against 0.79 for 128×64 with 8 warps; two programs fit"),
        256: Tile(64, 64, 8, 2, "the only one without spills"),
    },
    ("forward", "sm_90"): {
        64: Tile(128, 64, 8, 3, f"{MEASURED_ON}: 395 TFLOP/s; 128×64 with 4 warps 364, 128×128 with 2 stages 228"),
        128: Tile(64, 64, 4, 3, f"{MEASURED_ON}: 408 TFLOP/s; 128×64 with 8 warps 402, 128×128 with 2 stages 370"),
        256: Tile(128, 64, 8, 2, "static: shared memory allows no longer step with two stages"),
    },
    ("forward", "sm_100"): {
        128: Tile(128, 128, 8, 2, "M = 128 is the tensor unit's own; with 4 warps the softmax spills"),
        256: Tile(128, 64, 8, 2, "shared memory"),
    },
    ("forward", "gfx942"): {
        128: Tile(128, 64, 4, 1, "32×32 MFMA, one wave a SIMD; keys are loaded ahead through registers"),
        256: Tile(128, 32, 4, 1, "all 64 KiB of LDS; with 64 rows two waves would make the same scores"),
    },
    ("dq", "sm_80"): {
        64: Tile(128, 32, 4, 2, "32 rows a warp, overlap bound 1.0; a longer step spills"),
        128: Tile(128, 64, 8, 2, "4 warps spill"),
        256: Tile(64, 32, 4, 1, "shared memory; with 8 warps pairs of them make the same scores: 0.74, 0.45"),
    },
    ("dq", "sm_90"): {
        64: Tile(64, 64, 4, 3, f"{MEASURED_ON}: 511 TFLOP/s; 64×32 510, 64×64 with 2 stages 448"),
        128: Tile(128, 64, 8, 3, f"{MEASURED_ON}: 542 TFLOP/s; 64×32 with 4 warps 508, 2 stages 447"),
        256: Tile(
            128, 32, 8, 2, "static: two warp groups and loads ahead: 0.66 without spills; 64×32 with 4 warps 0.55"
        ),
    },
    ("dq", "sm_100"): {
        128: Tile(128, 64, 8, 2, "M = 128 is the tensor unit's own"),
        256: Tile(128, 32, 8, 1, "M = 128: 0.47, 64×32 0.32"),
    },
    ("dq", "gfx942"): {
        128: Tile(
            128, 32, 4, 1, "32×32 MFMA, 32 rows a wave: with 64 rows two waves would make the same scores: 0.61, 0.34"
        ),
        256: Tile(64, 16, 4, 1, "64 KiB of LDS"),
    },
    ("dkv", "sm_80"): {
        64: Tile(128, 32, 4, 2, "32 rows a warp, overlap bound 1.0"),
        128: Tile(64, 64, 4, 2, "two programs, overlap 0.82, no spill under any flag; 128×64 with 8 warps: one, 0.79"),
        256: Tile(32, 32, 4, 2, "two programs, loads ahead; 64 rows, 8 warps: pairs make the same scores (0.68, 0.48)"),
    },
    ("dkv", "sm_90"): {
        64: Tile(64, 128, 4, 2, f"{MEASURED_ON}: 355 TFLOP/s; 64×32 with 3 stages 357, 128×64 with 8 warps 232"),
        128: Tile(
            64, 32, 4, 3, f"{MEASURED_ON}: 391 TFLOP/s, 128×64 with 8 warps 359; 64×64 (432) spills under triton 3.7"
        ),
        256: Tile(
            64,
            64,
            8,
            2,
            "static: two accumulators of 64×256: both warp groups make the scores; 0.42, a step of 32 0.34",
        ),
    },
    ("dkv_prefix", "sm_90"): {
        64: Tile(64, 128, 4, 2, f"{MEASURED_ON}: 364 TFLOP/s; 128×32 with 4 stages 373, 128×64 with 8 warps 253"),
        128: Tile(
            64,
            32,
            4,
            2,
            f"{MEASURED_ON}: 326 TFLOP/s; 128×32 with 8 warps 345; 64×64 needs 4 stages (329), so one program",
        ),
    },
    ("dkv", "sm_100"): {
        128: Tile(128, 64, 8, 2, "M = 128 is the tensor unit's own"),
        256: Tile(64, 32, 8, 1, "tensor and shared memory"),
    },
    ("dkv", "gfx942"): {
        64: Tile(128, 64, 4, 1, "two programs; a step of 32: one, and addresses twice as often (0.41, 0.39)"),
        128: Tile(128, 32, 4, 1, "as dq: 0.55"),
        256: Tile(64, 16, 4, 1, "16×16 MFMA, 16 rows a wave: 0.58; steps of 32 make scores twice or more"),
    },
    ("forward", "sm_120"): {
        64: Tile(128, 64, 4, 2, "as sm_80"),
        128: Tile(
            128, 32, 8, 2, "0.78, overlap 1.0; a step of 64 (0.81) spills under triton 3.7, sm_80's row everywhere"
        ),
        256: Tile(64, 32, 4, 2, "99 KiB of shared memory"),
    },
    ("dq", "sm_120"): {
        64: Tile(128, 32, 4, 2, "as sm_80"),
        128: Tile(64, 32, 4, 2, "longer rows spill here"),
        256: Tile(64, 32, 4, 1, "as sm_80: 0.85, 0.51"),
    },
    ("dkv", "sm_120"): {
        64: Tile(128, 64, 8, 2, "sm_80's row spills here"),
        128: Tile(64, 32, 4, 2, "longer rows spill here"),
        256: Tile(32, 32, 4, 1, "99 KiB of shared memory"),
    },
    ("decode_prefix", "any"): {256: Tile(64, 1, 4, 1, BATCHED)},
    ("decode", "any"): {
        128: Tile(16, 64, 4, 2, SKINNY),
        256: Tile(16, 32, 4, 2, SKINNY),
    },
}

# fp32 products are exact (IEEE) unless TF32 is allowed. Loading ahead gains nothing.
LANES = "FP32 lanes: a thread holds whole rows of operands; longer steps or fewer warps spill, by thousands at D = 256"
MFMA = "gfx942 has matrix instructions for fp32; steps of 32 spill at D = 256"
FP32: dict[tuple[str, str], dict[int, Tile]] = {
    ("forward", "any"): {256: Tile(32, 16, 8, 1, LANES)},
    ("dq", "any"): {256: Tile(16, 16, 8, 1, LANES)},
    ("dkv", "any"): {128: Tile(32, 16, 8, 1, LANES), 256: Tile(16, 16, 8, 1, "99 KiB of shared memory, in TF32 too")},
    ("decode_prefix", "any"): {256: Tile(32, 1, 8, 1, "64 items spill on sm_90: by 92 at D = 128, 1115 at 256")},
    ("decode", "any"): {256: Tile(16, 16, 8, 1, LANES)},
    ("forward", "gfx942"): {256: Tile(32, 16, 4, 1, MFMA)},
    ("dq", "gfx942"): {256: Tile(32, 16, 4, 1, MFMA)},
    ("dkv", "gfx942"): {256: Tile(32, 16, 4, 1, MFMA)},
    ("decode", "gfx942"): {256: Tile(16, 16, 4, 1, MFMA)},
}

# With a soft cap, tanh and its slope need registers too. (pass, architecture, padded head dim) → row, where the row
# above spills.
CAPPED: dict[tuple[str, str, int], Tile] = {
    ("forward", "sm_120", 128): Tile(
        64, 32, 4, 2, "0.63, two programs; 128×32 with 8 warps: 0.72 but for 3 spills a step"
    ),
    ("dkv", "sm_90", 128): Tile(128, 32, 8, 2, "0.55; 128×64: 0.57 but for 9 spills a step"),
}


class Measured(UserDict[tuple[str, str, int, torch.dtype], Tile]):
    """Counts its changes, so that plans made before the last one are recognised as stale."""

    changes = 0

    def __setitem__(self, key: tuple[str, str, int, torch.dtype], row: Tile) -> None:
        self.changes += 1
        super().__setitem__(key, row)

    def __delitem__(self, key: tuple[str, str, int, torch.dtype]) -> None:
        self.changes += 1
        super().__delitem__(key)


MEASURED = Measured()  # filled by `softkv.kernels.tuning` only


def block_d(head_dim: int) -> int:
    """Head dims are padded to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(name: str, target: Target, head_dim: int, dtype: torch.dtype, capped: bool = False) -> Tile:
    """The row for a pass on a target: the measured one if `tuning` was used, otherwise the table's."""
    if measured := MEASURED.get((name, target.arch, block_d(head_dim), dtype)):
        return measured
    if target.arch == "interpreter":
        return INTERPRETER[name]
    if name in EVERYWHERE:
        return EVERYWHERE[name]
    table = FP32 if dtype == torch.float32 else TABLE
    if name == "dkv_prefix" and (
        (name, target.arch) not in table or block_d(head_dim) > max(table[name, target.arch]) or capped
    ):
        return tile("dkv", target, head_dim, dtype, capped)
    if capped and table is TABLE and (row := CAPPED.get((name, target.arch, block_d(head_dim)))):
        return row
    for arch in (target.arch, "any"):
        if rows := table.get((name, arch)):
            return rows[min(d for d in rows if d >= block_d(head_dim))]
    raise KeyError((name, target.arch))
