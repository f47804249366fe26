"""The default engine of a GPU call: looked up in a table of measurements, never timed at run time.

A row applies to plain calls, which every library kernel supports: dense, 16 bits, as many queries as keys, without a
bank, lengths, mask, window, chunk or cap. All other calls use Triton. Because prefix gradients are guaranteed to be
bitwise deterministic, a row for gradients needs an engine that passed that test (`softkv bench gpu`, determinism).
"""

from functools import cache
from typing import NamedTuple

import torch

from softkv.ops.engine import Call

DEFAULT = "triton"
_SPECIAL = ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "window", "chunk", "softcap")


class MeasuredRow(NamedTuple):
    """On this device, calls with this head dim and at least this many tokens and slots are fastest with `engine`."""

    device: str  # torch.cuda.get_device_name()
    gradients: bool  # any operand needs one: forward and backward together
    head_dim: int
    tokens: int  # T, at least
    slots: int  # P, at least; 0: no prefix
    work: int  # B·H·T, at least
    engine: str
    measured: str  # versions and date


# Filled from `softkv bench gpu` (docs/benchmarks.md). The first matching row is used.
MEASURED: tuple[MeasuredRow, ...] = ()


def engine_for(call: Call) -> str:
    """The engine of a checked call on a GPU."""
    if call["chunk"] is not None and call["window_covers_prefix"]:
        return "torch"  # the kernels count chunks from a row's first key only
    if not MEASURED or not _is_plain(call):
        return DEFAULT
    q, prefix = call["q"], call["prefix_k"]
    B, H, T, D = q.shape
    slots, device = 0 if prefix is None else prefix.shape[2], _name_of(q.device.index)
    operands = (q, call["k"], call["v"], prefix, call["prefix_v"], call["sinks"])
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
    for row in MEASURED:
        fits = (row.device, row.gradients, row.head_dim) == (device, gradients, D)
        if fits and row.tokens <= T and row.slots <= slots and row.work <= B * H * T:
            return row.engine
    return DEFAULT


def _is_plain(call: Call) -> bool:
    q, k, v, prefix = call["q"], call["k"], call["v"], call["prefix_k"]
    if q.dtype not in (torch.float16, torch.bfloat16) or q.dim() != 4 or not call["scale"] > 0:
        return False
    if call["window_covers_prefix"] or any(call[name] is not None for name in _SPECIAL):  # type: ignore[literal-required]
        return False
    return q.shape[2] == k.shape[2] > 1 and q.shape[3] == v.shape[3] and (prefix is None or prefix.shape[2] > 1)


@cache
def _name_of(device: int | None) -> str:
    return torch.cuda.get_device_name(device)
