"""Merge two parts and a sink in one pass over the outputs: one launch, each value read once.

    lse = log(Σ_i exp(lse_i) + exp(sink)),     out = Σ_i exp(lse_i − lse) out_i

An item is one token of one head: out [items, D], token by token.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # items per program: with D = 128 in 16 bits, 8 KiB of each operand
WARPS = 4


@triton.jit
def place(item, H, T, row, head, token, PACKED: tl.constexpr):
    """The offset of an item in a tensor of rows, heads and tokens, or (PACKED) of heads and flat tokens."""
    at = tl.cast(item // H, tl.int64)
    if PACKED:
        return tl.cast(item % H, tl.int64) * head + at * token
    return at // T * row + tl.cast(item % H, tl.int64) * head + at % T * token


@triton.jit
def weight(lse, top):
    return tl.where(lse == -float("inf"), 0.0, tl.exp(lse - top))


@triton.jit
def part(ptrs, keep, share):
    """A part of which a query saw nothing may contain any values."""
    keep = keep & (share > 0.0)[:, None]
    return tl.load(ptrs, mask=keep, other=0.0).to(tl.float32) * share[:, None]


@triton.jit(do_not_specialize=["count", "T"])
def merge_kernel(
    out_a, out_b, lse_a, lse_b, a_row, a_head, a_token, b_row, b_head, b_token, sinks, out, o_row, o_head, o_token,
    lse, l_row, l_head, l_token, count, H, T,
    D: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = item < count
    hidden = -float("inf")
    a = tl.load(lse_a + place(item, H, T, a_row, a_head, a_token, PACKED), mask=live, other=hidden)
    a = tl.where(a == float("inf"), hidden, a)  # how libraries mark a query that saw nothing
    top = a
    if lse_b is not None:
        b = tl.load(lse_b + place(item, H, T, b_row, b_head, b_token, PACKED), mask=live, other=hidden)
        b = tl.where(b == float("inf"), hidden, b)
        top = tl.maximum(top, b)
    if sinks is not None:
        sink = tl.load(sinks + item % H, mask=live, other=hidden).to(tl.float32)
        top = tl.maximum(top, sink)
    top = tl.where(top == hidden, 0.0, top)
    total = weight(a, top)
    if lse_b is not None:
        total += weight(b, top)
    if sinks is not None:
        total += weight(sink, top)
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    share = tl.where(seen, 1.0 / total, 0.0)

    columns = tl.arange(0, BLOCK_D)
    at = tl.cast(item, tl.int64)[:, None] * D + columns[None, :]
    keep = live[:, None] & (columns < D)[None, :]
    merged = part(out_a + at, keep, weight(a, top) * share)
    if out_b is not None:
        merged += part(out_b + at, keep, weight(b, top) * share)
    into = place(item, H, T, o_row, o_head, o_token, PACKED)[:, None] + columns[None, :]
    tl.store(out + into, merged.to(out.dtype.element_ty), mask=keep)
    total = tl.where(seen, top + tl.log(total), hidden)
    tl.store(lse + place(item, H, T, l_row, l_head, l_token, PACKED), total, mask=live)


def merge(parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None, out: Tensor) -> Tensor:
    """Write out [B, T, H, D], or packed [N, H, D], with any strides but the last, and return lse [B, H, T] or [H, N].

    `parts`: one or two (out, lse) of these shapes.
    """
    outs = [part_out.contiguous() for part_out, _ in parts]
    lse_a, lse_b = parts[0][1], parts[1][1] if len(parts) > 1 else None
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out.device)
    packed, (H, D) = out.dim() == 3, out.shape[-2:]
    count = out.numel() // D
    by_head = out.transpose(-2, -3)
    merge_kernel[(triton.cdiv(count, BLOCK),)](
        outs[0], outs[1] if lse_b is not None else None, lse_a, lse_b, *_strides(lse_a), *_strides(lse_b), sinks,
        out, *_strides(by_head[..., 0]), lse, *_strides(lse), count, H, 1 if packed else out.shape[1], D=D,
        PACKED=packed, BLOCK=BLOCK, BLOCK_D=triton.next_power_of_2(D), num_warps=WARPS,
    )  # fmt: skip
    return lse


def _strides(x: Tensor | None) -> Any:
    """(row, head, token) of [B, H, T], or of packed [H, N]."""
    if x is None:
        return 0, 0, 0
    return x.stride() if x.dim() == 3 else (0, *x.stride())
