"""The gradient of queries: as in the forward, a program owns items and iterates over the keys that they see.

    p = exp(s − lse)      ds = p ∘ (dout vᵀ − Δ)  (soft cap: ∘ (1 − tanh²))      dq = scale · ds k

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, D head dim.
"""

import triton
import triton.language as tl

from softkv.kernels.geometry import (
    block_of_program,
    item_offset,
    item_pointers,
    items_of_block,
    load_rows,
    masked_count,
    masked_start,
    prefix_of_row,
    row_extent,
    store_items,
    tile_offsets,
    tile_pointers,
)
from softkv.kernels.keys import key_exists, slots_seen, tokens_seen, visible
from softkv.kernels.launch import Launch
from softkv.kernels.problem import SIZES, Problem
from softkv.kernels.softmax import raw_scores, slope

POINTERS = (
    "q", "k", "v", "prefix_k", "prefix_v", "cu_seqlens_q", "cu_seqlens_k", "key_lengths", "key_mask", "prefix_index",
    "prefix_lengths", "position", "grad_out", "lse2", "delta", "dq",
)  # fmt: skip
STRIDES = ("q", "k", "v", "prefix_k", "prefix_v", "grad_out", "delta", "dq")


@triton.jit
def dq_step(
    dq, q, do, lse2, delta, k_ptrs, v_ptrs, exists, seen, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds k of one tile of keys. `exists` [N] and `seen` [M, N] are None if every key exists and every item sees
    it."""
    k = load_rows(k_ptrs, exists, HEAD_DIM, BLOCK_D)
    s = raw_scores(q, k, scale.softcap, PRECISION)
    p = slope(tl.exp2(s * scale.score - lse2[:, None]), s, scale.softcap is not None)
    v = load_rows(v_ptrs, exists, VALUE_DIM, BLOCK_V)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    if seen is not None:
        ds = tl.where(seen, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def collect_dq(
    dq, q, do, lse2, delta, keys, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add Σ ds k over a segment of keys: full tiles of N keys, then the edges, E at a time."""
    _, full_lo, full_hi, hi = keys.tiles
    k_ptrs = keys.k + tl.cast(full_lo, tl.int64) * keys.k_stride
    v_ptrs = keys.v + tl.cast(full_lo, tl.int64) * keys.v_stride
    k_offsets = tile_offsets(keys.k_stride, BLOCK_D, BLOCK_N)
    v_offsets = tile_offsets(keys.v_stride, BLOCK_V, BLOCK_N)
    k_step = tl.cast(BLOCK_N, tl.int64) * keys.k_stride
    v_step = tl.cast(BLOCK_N, tl.int64) * keys.v_stride
    for _start in range(full_lo, full_hi, BLOCK_N):
        dq = dq_step(
            dq, q, do, lse2, delta, k_ptrs + k_offsets, v_ptrs + v_offsets, None, None, scale,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
        k_ptrs += k_step
        v_ptrs += v_step
    for i in range(masked_count(keys.tiles, BLOCK_E)):
        start = masked_start(i, keys.tiles, BLOCK_E)
        j = start + tl.arange(0, BLOCK_E)
        exists = key_exists(j, keys.lower, hi, keys.mask)
        dq = dq_step(
            dq, q, do, lse2, delta, tile_pointers(keys.k, start, keys.k_stride, BLOCK_D, BLOCK_E),
            tile_pointers(keys.v, start, keys.v_stride, BLOCK_V, BLOCK_E), exists, visible(j, exists, keys), scale,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
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
    do_at = item_offset(stride.grad_out, row, token, head)
    do = load_rows(item_pointers(ptr.grad_out, do_at, BLOCK_V), live, VALUE_DIM, BLOCK_V)
    at = item_offset(stride.delta, row, token, head)
    lse2 = tl.load(ptr.lse2 + at, mask=live, other=float("inf"))
    delta = tl.load(ptr.delta + at, mask=live, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if ptr.prefix_k is not None:
        a, length = prefix_of_row(row, ptr, A, P, SHARED)
        flat = tl.cast(row, tl.int64) * T + token
        keys = slots_seen(flat, live, a, length, g, ptr, stride, reach, BLOCK_N)
        dq = collect_dq(
            dq, q, do, lse2, delta, keys, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, BLOCK_E, PRECISION
        )
    keys = tokens_seen(
        block, row, g, t_count, k_start, n, S, ptr, stride, reach, CAUSAL, CHUNKED, GROUP, BLOCK_M, BLOCK_N
    )
    dq = collect_dq(
        dq, q, do, lse2, delta, keys, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, BLOCK_E, PRECISION
    )
    store_items(ptr.dq, item_offset(stride.dq, row, token, head), dq * scale.dq, live, HEAD_DIM, BLOCK_D)


def plan_dq(p: Problem) -> Launch:
    tile = p.tile("dq")
    return Launch(
        dq_kernel, triton.cdiv(p.T_max * p.group, tile.own) * p.G * p.B, tile, p.pointers(*POINTERS),
        stride=p.strides(*STRIDES), scale=p.scales, **p.sizes, **p.dims, CAUSAL=p.is_causal, CHUNKED=p.chunked,
        SHARED=p.shared, BLOCK_M=tile.own, BLOCK_N=tile.step, BLOCK_E=tile.edge,
    )  # fmt: skip
