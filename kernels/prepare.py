"""Before the backward: Δ = Σ_d out·dout − dlse and the base-2 lse of every item (+∞ for an item that saw nothing, so
that its p is 0).

Axes: H query heads, T query tokens, D head dim of values; an item here is (flat token, head).
"""

import triton
import triton.language as tl

from softkv.kernels.geometry import item_pointers, load_rows, token_offset
from softkv.kernels.launch import Launch
from softkv.kernels.problem import Problem
from softkv.kernels.softmax import LOG2E
from softkv.kernels.tiles import block_d


@triton.jit(do_not_specialize=["T", "H", "count"])
def prepare_kernel(
    ptr, stride, T, H, count,
    PACKED: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = item < tl.cast(count, tl.int64) * H
    token = item // H
    head = item % H
    out_at = token_offset(stride.out, token, head, T, PACKED)
    o = load_rows(item_pointers(ptr.out, out_at, BLOCK_V), live, VALUE_DIM, BLOCK_V)
    grad_at = token_offset(stride.grad_out, token, head, T, PACKED)
    do = load_rows(item_pointers(ptr.grad_out, grad_at, BLOCK_V), live, VALUE_DIM, BLOCK_V)
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if ptr.grad_lse is not None:
        total -= tl.load(ptr.grad_lse + token_offset(stride.grad_lse, token, head, T, PACKED), mask=live, other=0)
    log_sum = tl.load(ptr.lse + token_offset(stride.lse, token, head, T, PACKED), mask=live, other=0)
    blind = log_sum == float("-inf")
    at = token_offset(stride.delta, token, head, T, PACKED)
    tl.store(ptr.lse2 + at, tl.where(blind, float("inf"), log_sum * LOG2E), mask=live)
    tl.store(ptr.delta + at, tl.where(blind, 0.0, total), mask=live)


def plan_prepare(p: Problem) -> Launch:
    tile = p.tile("prepare")
    return Launch(
        prepare_kernel, triton.cdiv(p.tokens * p.H, tile.own), tile,
        p.pointers("out", "lse", "grad_out", "grad_lse", "lse2", "delta"),
        stride=p.strides("out", "lse", "grad_out", "grad_lse", "delta"), T=p.T, H=p.H, count=p.tokens,
        PACKED=p.packed, VALUE_DIM=p.value_dim, BLOCK_V=block_d(p.value_dim), BLOCK_M=tile.own,
    )  # fmt: skip
