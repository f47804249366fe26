"""Backward: gradients of queries, of token keys and values, and of the prefix, summed over everything that read it.

With the merged lse of the forward, p = exp(s − lse) is each key's share, whichever tensor it lies in, and

    Δ = Σ_d out·dout − dlse          ds = p ∘ (dout vᵀ − Δ)          (soft cap: ds ∘ (1 − tanh²))
    dq = scale · ds k                dk = scale · dsᵀ q              dv = pᵀ dout
    dsink = −Σ exp(sink − lse)·Δ

`prepare_kernel` writes Δ and the base-2 lse (+∞ for an item that saw nothing, so that its p is 0). `dq_kernel` walks keys as
the forward does. `dkv_kernel` keeps a tile of keys and walks items: for token keys the items of its row, for a prefix the
items of *all* rows that read it, and all heads of the group, so the reduction over the batch happens in registers. When
prefix tiles alone would leave the device idle, items are split in `parts` and fp32 partial sums are added in a second pass,
always in the same order. A key nobody needs to mask is not masked: what a hidden key's row adds up is not stored.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, A prefixes, D head dim.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from softkv.kernels.geometry import (
    Groups,
    Operand,
    block_of_program,
    item_offset,
    item_pointers,
    items_of_block,
    load_some,
    load_whole,
    masked_count,
    masked_start,
    prefix_length,
    prefix_of_row,
    row_extent,
    share,
    span,
    store_items,
    tile_offsets,
    tile_pointers,
    token_offset,
)
from softkv.kernels.keys import key_exists, slots_seen, tokens_seen, visible
from softkv.kernels.launch import launch
from softkv.kernels.problem import SIZES, Problem, per_item, slots, tokens
from softkv.kernels.reduce import add_parts
from softkv.kernels.softmax import LOG2E, raw_scores
from softkv.kernels.tiles import block_d

WAVES = 2  # programs a multiprocessor that a split reduction over a prefix aims at
NO_GROUPS = Groups(None, None, None)


@triton.jit(do_not_specialize=[*SIZES, "count"])
def prepare_kernel(
    out, grad_out, lse, grad_lse, lse2, delta, T, H, count,
    PACKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Δ and the base-2 lse of items; here an item is (flat token, head)."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = item < tl.cast(count, tl.int64) * H
    token = item // H
    head = item % H
    o = load_some(
        item_pointers(out.ptr, token_offset(out, token, T, PACKED) + head * out.head, BLOCK_D), live, HEAD_DIM, BLOCK_D
    )
    do = load_some(
        item_pointers(grad_out.ptr, token_offset(grad_out, token, T, PACKED) + head * grad_out.head, BLOCK_D),
        live,
        HEAD_DIM,
        BLOCK_D,
    )
    total = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = token_offset(lse, token, T, PACKED) + head * lse.head
    if grad_lse.ptr is not None:
        at_grad = token_offset(grad_lse, token, T, PACKED) + head * grad_lse.head
        total -= tl.load(grad_lse.ptr + at_grad, mask=live, other=0)
    log_sum = tl.load(lse.ptr + at, mask=live, other=0)
    at = token_offset(delta, token, T, PACKED) + head * delta.head
    tl.store(lse2.ptr + at, tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2E), mask=live)
    tl.store(delta.ptr + at, tl.where(log_sum == float("-inf"), 0.0, total), mask=live)


@triton.jit
def slope(p, s, CAPPED: tl.constexpr):
    """p times the soft cap's slope, by the raw scores s: taken before dp is there, so that s needs no registers then."""
    if CAPPED:
        p = p * (1 - s * s)
    return p


@triton.jit
def collect_dq(
    dq, q, do, lse2, delta, keys, mask_ptr, score_scale, softcap_scale, BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add Σ_keys ds k over a stretch of keys."""
    k_ptr, v_ptr, k_stride, v_stride, bound, upper, tiles = keys
    lower = None
    if BOUNDED:
        lower = bound
    _, full_lo, full_hi, hi = tiles
    k_at = k_ptr + tl.cast(full_lo, tl.int64) * k_stride
    v_at = v_ptr + tl.cast(full_lo, tl.int64) * v_stride
    k_offsets = tile_offsets(k_stride, BLOCK_D, BLOCK_N)
    v_offsets = tile_offsets(v_stride, BLOCK_D, BLOCK_N)
    k_step = tl.cast(BLOCK_N, tl.int64) * k_stride
    v_step = tl.cast(BLOCK_N, tl.int64) * v_stride
    for _start in range(full_lo, full_hi, BLOCK_N):
        k = load_whole(k_at + k_offsets, HEAD_DIM, BLOCK_D)
        s = raw_scores(q, k, softcap_scale, PRECISION)
        p = slope(tl.exp2(s * score_scale - lse2[:, None]), s, softcap_scale is not None)
        v = load_whole(v_at + v_offsets, HEAD_DIM, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_at += k_step
        v_at += v_step
    for i in range(masked_count(tiles, BLOCK_E)):
        start = masked_start(i, tiles, BLOCK_E)
        j = start + tl.arange(0, BLOCK_E)
        exists = key_exists(j, lower, hi, mask_ptr)
        k = load_some(tile_pointers(k_ptr, start, k_stride, BLOCK_D, BLOCK_E), exists, HEAD_DIM, BLOCK_D)
        s = raw_scores(q, k, softcap_scale, PRECISION)
        p = slope(tl.exp2(s * score_scale - lse2[:, None]), s, softcap_scale is not None)
        v = load_some(tile_pointers(v_ptr, start, v_stride, BLOCK_D, BLOCK_E), exists, HEAD_DIM, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        ds = tl.where(exists[None, :] & visible(j, lower, upper), ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q, k, v, prefix_k, prefix_v, grad_out, lse2, delta, dq, rows, prefix, score_scale, softcap_scale, window, grad_scale,
    B, G, T, S, A, P,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`: M items of a row, over the prefix and then over the row's keys."""
    row, g, block = block_of_program(B, G)
    q_start, t_count, k_start, n = row_extent(row, rows, T, S)
    if block * BLOCK_M >= t_count * GROUP:
        return
    live, token, head = items_of_block(block, q_start, t_count, g, GROUP, BLOCK_M)
    q_tile = load_some(item_pointers(q.ptr, item_offset(q, row, token, head), BLOCK_D), live, HEAD_DIM, BLOCK_D)
    do_at = item_offset(grad_out, row, token, head)
    do_tile = load_some(item_pointers(grad_out.ptr, do_at, BLOCK_D), live, HEAD_DIM, BLOCK_D)
    at = item_offset(delta, row, token, head)
    lse2_tile = tl.load(lse2.ptr + at, mask=live, other=float("inf"))
    delta_tile = tl.load(delta.ptr + at, mask=live, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if prefix_k.ptr is not None:
        a, length = prefix_of_row(row, prefix, A, P, SHARED)
        flat = tl.cast(row, tl.int64) * T + token
        keys = slots_seen(flat, live, a, length, g, prefix_k, prefix_v, prefix, window, BLOCK_N)
        acc = collect_dq(
            acc, q_tile, do_tile, lse2_tile, delta_tile, keys, None, score_scale, softcap_scale, prefix.position is not None,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
        )  # fmt: skip
    mask = None
    if rows.mask is not None:
        mask = rows.mask + tl.cast(row, tl.int64) * S
    keys = tokens_seen(
        block, row, g, t_count, k_start, n, k, v, window, rows.mask is not None, CAUSAL, GROUP, BLOCK_M, BLOCK_N
    )  # fmt: skip
    acc = collect_dq(
        acc, q_tile, do_tile, lse2_tile, delta_tile, keys, mask, score_scale, softcap_scale, window is not None,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip
    store_items(dq.ptr, item_offset(dq, row, token, head), acc * grad_scale, live, HEAD_DIM, BLOCK_D)


@triton.jit
def load_per_item(ptrs, live, hidden):
    """One number an item, read where it is used: it then holds no registers during a product."""
    return tl.load(ptrs, mask=live, other=hidden) if live is not None else tl.load(ptrs)


@triton.jit
def collect_dkv(
    dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, at, live, seen, score_scale, softcap_scale,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile step of the key side, transposed: rows are keys, columns are items, which lie `at` offsets in q, dout, Δ.

    `live` [M] and `seen` [N, M] are None where every item exists and sees every key."""
    at_q, at_do, at_item = at
    q_ptrs = item_pointers(q_ptr, at_q, BLOCK_D)
    do_ptrs = item_pointers(do_ptr, at_do, BLOCK_D)
    q_tile = load_some(q_ptrs, live, HEAD_DIM, BLOCK_D) if live is not None else load_whole(q_ptrs, HEAD_DIM, BLOCK_D)
    s = raw_scores(k, q_tile, softcap_scale, PRECISION)
    p = tl.exp2(s * score_scale - load_per_item(lse2_ptr + at_item, live, float("inf"))[None, :])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    do = load_some(do_ptrs, live, HEAD_DIM, BLOCK_D) if live is not None else load_whole(do_ptrs, HEAD_DIM, BLOCK_D)
    if NEED_V:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    if NEED_K:
        p = slope(p, s, softcap_scale is not None)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - load_per_item(delta_ptr + at_item, live, 0.0)[None, :])
        if seen is not None:  # dp of a hidden key may be anything
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def place_items(
    items, live, q, grad_out, delta, order, first, g, T,
    FLAT: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Offsets in (q, dout, Δ) of items: of one row, counted from its start, or (FLAT) of all tokens that read
    a prefix. LINEAR: flat token u lies u items from the start. Offsets are 64-bit only where they must be (WIDE)."""
    head = g * GROUP + items % GROUP
    token = first + items // GROUP
    if order is not None:
        token = tl.load(order + token, mask=live, other=0) if live is not None else tl.load(order + token)
    if WIDE:
        head = tl.cast(head, tl.int64)
        token = tl.cast(token, tl.int64)
    if FLAT and not LINEAR:
        row = token // T
        t = token % T
        at_q = row * q.row + t * q.item
        at_do = row * grad_out.row + t * grad_out.item
    else:
        at_q = token * q.item
        at_do = token * grad_out.item
    return at_q + head * q.head, at_do + head * grad_out.head, token * delta.item + head * delta.head


@triton.jit
def readers_of_key(j, n, T, window, CAUSAL: tl.constexpr, GROUP: tl.constexpr):
    """(first, last) item that sees key j of a row with n keys and T queries."""
    lower = j * 0
    upper = j * 0 + (T * GROUP - 1)
    if CAUSAL:
        diagonal = j - (n - T)
        lower = tl.maximum(diagonal, 0) * GROUP
        if window is not None:
            upper = tl.minimum((diagonal + window) * GROUP - 1, upper)
    return lower, upper


@triton.jit
def readers_of_slot(j, a, readers, P, groups, GROUP: tl.constexpr):
    """(first, last) item that sees slot j of prefix a: all that read it, or (window) those up to a position."""
    lower = j * 0
    if groups.seen is not None:
        upper = tl.load(groups.seen + a * P + j, mask=j < P, other=0) * GROUP - 1
    else:
        upper = j * 0 + (readers * GROUP - 1)
    return lower, upper


@triton.jit(do_not_specialize=[*SIZES, "count", "parts"])
def dkv_kernel(
    q, k, v, grad_out, lse2, delta, dk, dv, rows, prefix, groups, score_scale, softcap_scale, window, grad_scale,
    B, G, T, S, A, P, count, parts,
    OVER_PREFIX: tl.constexpr, PACKED: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N keys of a row, or N slots of a prefix (`k`, `v` are then the bank), over the items that see them."""
    program = tl.program_id(0)
    part = program % parts
    program = program // parts
    sources = A if OVER_PREFIX else B
    source = program % sources
    g = (program // sources) % G
    j_first = program // (sources * G) * BLOCK_N
    j = j_first + tl.arange(0, BLOCK_N)
    source64 = tl.cast(source, tl.int64)

    mask = None
    if OVER_PREFIX:
        k_start = 0
        n = prefix_length(source, prefix, A, P)
        stored = P
        first = 0
        readers = count
        if groups.start is not None:
            first = tl.load(groups.start + source)
            readers = tl.load(groups.start + source + 1) - first
    else:
        first, readers, k_start, n = row_extent(source, rows, T, S)
        stored = n if PACKED else S
        if rows.mask is not None:
            mask = rows.mask + source64 * S
    # Bounds grow with j: those of the first and of the last existing key say which tiles need a mask.
    last = tl.maximum(tl.minimum(j_first + BLOCK_N, n) - 1, j_first)
    if OVER_PREFIX:
        lower_min, upper_min = readers_of_slot(j_first, source, readers, P, groups, GROUP)
        lower_max, upper_max = readers_of_slot(last, source, readers, P, groups, GROUP)
    else:
        lower_min, upper_min = readers_of_key(j_first, n, readers, window, CAUSAL, GROUP)
        lower_max, upper_max = readers_of_key(last, n, readers, window, CAUSAL, GROUP)
    upper_max = tl.where(j_first < n, upper_max, -1)
    tiles = span(lower_min, lower_max, upper_min, upper_max, False, BLOCK_M)
    if OVER_PREFIX:
        tiles = share(tiles, part, parts, BLOCK_M)
    _, full_lo, full_hi, hi = tiles

    k0 = tl.cast(k_start, tl.int64)
    g64 = tl.cast(g, tl.int64)
    k_base = k.ptr + source64 * k.row + k0 * k.item + g64 * k.head
    v_base = v.ptr + source64 * v.row + k0 * v.item + g64 * v.head
    k_tile = load_some(tile_pointers(k_base, j_first, k.item, BLOCK_D, BLOCK_N), j < n, HEAD_DIM, BLOCK_D)
    v_tile = load_some(tile_pointers(v_base, j_first, v.item, BLOCK_D, BLOCK_N), j < n, HEAD_DIM, BLOCK_D)
    row64 = source64 * 0 if OVER_PREFIX else source64
    q_base = q.ptr + row64 * q.row
    do_base = grad_out.ptr + row64 * grad_out.row
    lse2_base = lse2.ptr + row64 * lse2.row
    delta_base = delta.ptr + row64 * delta.row
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(full_lo, full_hi, BLOCK_M):
        items = start + tl.arange(0, BLOCK_M)
        places = place_items(
            items, None, q, grad_out, delta, groups.order, first, g, T, OVER_PREFIX, LINEAR, WIDE, GROUP
        )
        dk_tile, dv_tile = collect_dkv(
            dk_tile, dv_tile, k_tile, v_tile, q_base, do_base, lse2_base, delta_base, places, None, None, score_scale, softcap_scale,
            NEED_K, NEED_V, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    for i in range(masked_count(tiles, BLOCK_E)):
        items = masked_start(i, tiles, BLOCK_E) + tl.arange(0, BLOCK_E)
        live = items < hi
        places = place_items(
            items, live, q, grad_out, delta, groups.order, first, g, T, OVER_PREFIX, LINEAR, WIDE, GROUP
        )
        if OVER_PREFIX:
            lower, upper = readers_of_slot(j, source, readers, P, groups, GROUP)
        else:
            lower, upper = readers_of_key(j, n, readers, window, CAUSAL, GROUP)
        seen = (items[None, :] >= lower[:, None]) & (items[None, :] <= upper[:, None])
        dk_tile, dv_tile = collect_dkv(
            dk_tile, dv_tile, k_tile, v_tile, q_base, do_base, lse2_base, delta_base, places, live, seen, score_scale, softcap_scale,
            NEED_K, NEED_V, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip

    keep = j < stored
    exists = key_exists(j, None, n, mask)
    row = source64 + tl.cast(part, tl.int64) * sources
    if NEED_K:
        offsets = row * dk.row + (k0 + j) * dk.item + g64 * dk.head
        store_items(dk.ptr, offsets, tl.where(exists[:, None], dk_tile * grad_scale, 0.0), keep, HEAD_DIM, BLOCK_D)
    if NEED_V:
        offsets = row * dv.row + (k0 + j) * dv.item + g64 * dv.head
        store_items(dv.ptr, offsets, tl.where(exists[:, None], dv_tile, 0.0), keep, HEAD_DIM, BLOCK_D)


def prepare(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """(base-2 lse, Δ), each [H, tokens]: of flat tokens, whatever q's layout."""
    p, tile = problem, problem.tile("prepare")
    lse2, delta = (lse.new_empty(p.H, p.tokens) for _ in range(2))
    launch(
        prepare_kernel, triton.cdiv(p.tokens * p.H, tile.own), tile,
        out=tokens(out), grad_out=tokens(grad_out), lse=per_item(lse),
        grad_lse=Operand(None, 0, 0, 0) if grad_lse is None else per_item(grad_lse),
        lse2=p.workspace(lse2), delta=p.workspace(delta), T=p.T, H=p.H, count=p.tokens,
        PACKED=p.packed, HEAD_DIM=p.D, BLOCK_D=block_d(p.D), BLOCK_M=tile.own,
    )  # fmt: skip
    return lse2, delta


def run_dq(problem: Problem, grad_out: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    p, tile = problem, problem.tile("dq")
    dq = torch.empty_like(p.q)
    blocks = triton.cdiv(p.T_max * p.group, tile.own)
    launch(
        dq_kernel, blocks * p.G * p.B, tile, **p.arguments(), grad_out=tokens(grad_out), lse2=p.workspace(lse2),
        delta=p.workspace(delta), dq=tokens(dq), grad_scale=-p.scale if p.flipped else p.scale,
        BLOCK_M=tile.own, BLOCK_N=tile.step, BLOCK_E=tile.edge,
    )  # fmt: skip
    return dq


def run_dkv(
    problem: Problem, grad_out: Tensor, lse2: Tensor, delta: Tensor, over_prefix: bool, need_k: bool, need_v: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the token keys and values, or of the prefix's."""
    p, tile = problem, problem.tile("dkv")
    keys, values = (p.prefix_k, p.prefix_v) if over_prefix else (p.k, p.v)
    operand = slots if over_prefix else tokens
    sources, length = (p.A, p.P) if over_prefix else (p.B, p.S_max)
    programs = triton.cdiv(length, tile.own) * p.G * sources
    parts = 1
    if over_prefix:  # as many item tiles as there are, but no more programs than fill the device
        most = triton.cdiv(p.tokens * p.group, tile.step * sources)
        parts = max(1, min(most, WAVES * p.target.units // max(programs, 1)))
    dk = parts_like(keys, parts) if need_k else None
    dv = parts_like(values, parts) if need_v else None
    arguments = p.arguments() | {"k": operand(keys), "v": operand(values)}
    for unused in ("prefix_k", "prefix_v", "SHARED"):
        del arguments[unused]
    launch(
        dkv_kernel, programs * parts, tile, **arguments, grad_out=tokens(grad_out), lse2=p.workspace(lse2),
        delta=p.workspace(delta), dk=part_operand(dk, operand), dv=part_operand(dv, operand),
        groups=p.readers() if over_prefix else NO_GROUPS, grad_scale=p.scale, count=p.tokens, parts=parts,
        OVER_PREFIX=over_prefix, PACKED=p.packed, LINEAR=linear(p.q) and linear(grad_out), WIDE=wide(p.q) or wide(grad_out), NEED_K=need_k, NEED_V=need_v, BLOCK_M=tile.step, BLOCK_N=tile.own, BLOCK_E=tile.edge,
    )  # fmt: skip
    return add_parts(dk, keys), add_parts(dv, values)


def linear(x: Tensor) -> bool:
    """Whether flat token u lies u items from the start: packed, or [B, T, H, D] in memory."""
    return x.dim() == 3 or x.stride(0) == x.shape[2] * x.stride(2)


def wide(x: Tensor) -> bool:
    """Whether offsets in x pass 31 bits."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31


def parts_like(x: Tensor, parts: int) -> Tensor:
    """Where a gradient of x goes: straight to it, or as `parts` fp32 partial sums [parts, *x.shape]."""
    return torch.empty_like(x)[None] if parts == 1 else x.new_empty((parts, *x.shape), dtype=torch.float32)


def part_operand(x: Tensor | None, operand: Callable[[Tensor], Operand]) -> Operand:
    return Operand(None, 0, 0, 0) if x is None else operand(x[0])


def run_backward(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dprefix_k, dprefix_v, dsinks), None where `needs` says so."""
    need_q, need_k, need_v, need_prefix_k, need_prefix_v, need_sinks = needs
    if problem.prefix_k is None:
        need_prefix_k = need_prefix_v = False
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    lse2, delta = prepare(problem, grad_out, grad_lse, out, lse)
    dq = dk = dv = dprefix_k = dprefix_v = dsinks = None
    if need_q:
        dq = run_dq(problem, grad_out, lse2, delta)
    if need_k or need_v:
        dk, dv = run_dkv(problem, grad_out, lse2, delta, False, need_k, need_v)
    if need_prefix_k or need_prefix_v:
        dprefix_k, dprefix_v = run_dkv(problem, grad_out, lse2, delta, True, need_prefix_k, need_prefix_v)
    if need_sinks and problem.sinks is not None:
        dsinks = -(torch.exp2(problem.sinks.float()[:, None] * math.log2(math.e) - lse2) * delta).sum(1)
        dsinks = dsinks.to(problem.sinks.dtype)
    return dq, dk, dv, dprefix_k, dprefix_v, dsinks
