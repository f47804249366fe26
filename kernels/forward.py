"""Forward: attention of every query to its prefix, then to the tokens of its row, in one pass.

    out = (Σ_slots 2^(s − lse) v_slot + Σ_tokens 2^(s − lse) v_token),     lse = ln(Σ exp(s) + exp(sink))

A program owns M items (query tokens × the H/G heads of a group) of one row. It iterates over the prefix, which is read
in place (with stride 0 over the batch if shared, or selected by `prefix_index` in a bank), then over the row's key
tiles. Programs with the last queries start first, because they see the most keys; neighbours share the kv-head, so
prefix and keys are found in L2.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, D head dim, GROUP = H/G.
"""

import triton
import triton.language as tl

from softkv.kernels.geometry import (
    block_of_program,
    item_offset,
    item_pointers,
    items_of_block,
    load_rows,
    prefix_of_row,
    row_extent,
    store_items,
)
from softkv.kernels.keys import slots_seen, tokens_seen
from softkv.kernels.launch import Launch, Plan
from softkv.kernels.problem import SIZES, Problem
from softkv.kernels.softmax import LOWEST, attend, finish

POINTERS = (
    "q", "k", "v", "prefix_k", "prefix_v", "sinks", "cu_seqlens_q", "cu_seqlens_k", "key_lengths", "key_mask",
    "prefix_index", "prefix_lengths", "position", "out", "lse",
)  # fmt: skip
STRIDES = ("q", "k", "v", "prefix_k", "prefix_v", "out", "lse")


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    ptr, stride, scale, B, G, T, S, A, P, reach,
    CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, g, block = block_of_program(B, G)
    q_start, t_count, k_start, n = row_extent(row, ptr, T, S)
    if block * BLOCK_M >= t_count * GROUP:
        return
    live, token, head = items_of_block(block, q_start, t_count, g, GROUP, BLOCK_M)
    q = load_rows(item_pointers(ptr.q, item_offset(stride.q, row, token, head), BLOCK_D), live, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if ptr.prefix_k is not None:
        a, length = prefix_of_row(row, ptr, A, P, SHARED)
        flat = tl.cast(row, tl.int64) * T + token
        keys = slots_seen(flat, live, a, length, g, ptr, stride, reach, BLOCK_N)
        acc, m, l = attend(
            acc, m, l, q, keys, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, BLOCK_E, PRECISION
        )
    keys = tokens_seen(
        block, row, g, t_count, k_start, n, S, ptr, stride, reach, CAUSAL, CHUNKED, GROUP, BLOCK_M, BLOCK_N
    )
    acc, m, l = attend(acc, m, l, q, keys, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, BLOCK_E, PRECISION)
    sink = None
    if ptr.sinks is not None:
        sink = tl.load(ptr.sinks + head, mask=live, other=0).to(tl.float32)
    acc, total = finish(acc, m, l, sink)
    store_items(ptr.out, item_offset(stride.out, row, token, head), acc, live, VALUE_DIM, BLOCK_V)
    tl.store(ptr.lse + item_offset(stride.lse, row, token, head), total, mask=live)


def plan_forward(p: Problem, tile_of: str = "forward") -> Plan:
    """(out like q, lse [B, H, T] or [H, N] fp32), in one launch."""
    tile = p.tile(tile_of)
    launch = Launch(
        forward_kernel, triton.cdiv(p.T_max * p.group, tile.own) * p.G * p.B, tile, p.pointers(*POINTERS),
        stride=p.strides(*STRIDES), scale=p.scales, **p.sizes, **p.dims, CAUSAL=p.is_causal, CHUNKED=p.chunked,
        SHARED=p.shared, BLOCK_M=tile.own, BLOCK_N=tile.step, BLOCK_E=tile.edge,
    )  # fmt: skip
    return Plan({name: p.like[name] for name in ("out", "lse")}, [*p.preparations(), launch], ("out", "lse"))
