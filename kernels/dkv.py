"""Gradients of keys and values: of the tokens, and of the prefix, summed over all its readers.

    p = exp(s − lse)      ds = p ∘ (dout vᵀ − Δ)  (soft cap: ∘ (1 − tanh²))      dk = scale · dsᵀ q      dv = pᵀ dout

A program keeps a tile of keys and iterates over items: for token keys the items of its row, for a prefix the items of
*all* rows that read it, with all heads of the group, so the reduction over the batch happens in registers. Both kinds
share one grid, with the prefix's programs first. If these are too few to fill the device, their items are split into
`parts`, and the fp32 partial sums are added in a second pass (`softkv.kernels.reduce`), always in the same order.
Hidden keys are not masked; their sums are just not stored.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, A prefixes, D head dim.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softkv.kernels.geometry import (
    Strides,
    item_pointers,
    load_rows,
    masked_count,
    masked_start,
    prefix_length,
    row_extent,
    share,
    span,
    store_items,
    tile_pointers,
)
from softkv.kernels.keys import key_exists
from softkv.kernels.launch import Launch, Memory
from softkv.kernels.problem import SIZES, SLOTS, Problem, contiguous
from softkv.kernels.readers import Readers, group_extent
from softkv.kernels.softmax import raw_scores, slope

WAVES = 2  # target number of programs per multiprocessor for a split reduction over a prefix
READ = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "key_lengths", "key_mask", "prefix_k", "prefix_v", "prefix_lengths",
    "grad_out", "lse2", "delta",
)  # fmt: skip


class Items(NamedTuple):
    """Pointers from which items are loaded: to those of a row, or to all."""

    q: Any
    grad_out: Any
    lse2: Any
    delta: Any
    order: Any  # flat tokens sorted by the prefix that they read, or None


@triton.jit
def load_per_item(ptrs, live, hidden):
    """One value per item, loaded just before its use, so that it needs no registers during a product."""
    return tl.load(ptrs, mask=live, other=hidden) if live is not None else tl.load(ptrs)


@triton.jit
def dkv_step(
    dk, dv, k, v, of, at_q, at_do, at_item, live, seen, scale, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of items, transposed: rows are keys, columns are items at the given offsets in q, dout, Δ.

    `live` [M] and `seen` [N, M] are None if every item exists and sees every key."""
    q = load_rows(item_pointers(of.q, at_q, BLOCK_D), live, HEAD_DIM, BLOCK_D)
    s = raw_scores(k, q, scale.softcap, PRECISION)
    p = tl.exp2(s * scale.score - load_per_item(of.lse2 + at_item, live, float("inf"))[None, :])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    do = load_rows(item_pointers(of.grad_out, at_do, BLOCK_V), live, VALUE_DIM, BLOCK_V)
    if NEED_V:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    if NEED_K:
        p = slope(p, s, scale.softcap is not None)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - load_per_item(of.delta + at_item, live, 0.0)[None, :])
        if seen is not None:  # dp of a hidden key is arbitrary
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def place_items(
    items, live, order, stride, first, g, T,
    FLAT: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Offsets of items in (q, dout, Δ): of one row, relative to its start, or (FLAT) of all tokens that read a prefix.

    LINEAR: flat token u is u items from the start. Offsets are 64-bit only if necessary (WIDE)."""
    head = g * GROUP + items % GROUP
    token = first + items // GROUP
    if order is not None:
        token = tl.load(order + token, mask=live, other=0) if live is not None else tl.load(order + token)
    if WIDE:
        head = tl.cast(head, tl.int64)
        token = tl.cast(token, tl.int64)
    if FLAT and not LINEAR:
        t = token % T
        at_q = (token // T) * stride.q.row + t * stride.q.item
        at_do = (token // T) * stride.grad_out.row + t * stride.grad_out.item
    else:
        at_q = token * stride.q.item
        at_do = token * stride.grad_out.item
    at_item = token * stride.delta.item + head * stride.delta.head
    return at_q + head * stride.q.head, at_do + head * stride.grad_out.head, at_item


@triton.jit
def readers_of_key(j, n, T, reach, CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, GROUP: tl.constexpr):
    """The (first, last) item that sees key j of a row with n keys and T queries."""
    lower = j * 0
    upper = j * 0 + (T * GROUP - 1)
    if CAUSAL:
        lower = tl.maximum(j - (n - T), 0) * GROUP
        if reach is not None:
            end = (j // reach + 1) * reach if CHUNKED else j + reach
            upper = tl.minimum((end - (n - T)) * GROUP - 1, upper)
    return lower, upper


@triton.jit
def readers_of_slot(j, a, readers, P, ptr, GROUP: tl.constexpr):
    """The (first, last) item that sees slot j of prefix a: all its readers, or (window) those up to a position."""
    lower = j * 0
    if ptr.seen is not None:
        upper = tl.load(ptr.seen + a * P + j, mask=j < P, other=0) * GROUP - 1
    else:
        upper = j * 0 + (readers * GROUP - 1)
    return lower, upper


@triton.jit
def collect_dkv(
    dk, dv, k, v, j, n, source, first, readers, tiles, g, of, ptr, stride, scale, T, P, reach, STAGES: tl.constexpr,
    OVER_PREFIX: tl.constexpr, CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate a tile of keys over the items that see them: full tiles of M items, then the edges, E at a time."""
    _, full_lo, full_hi, hi = tiles
    for start in tl.range(full_lo, full_hi, BLOCK_M, num_stages=STAGES):
        items = start + tl.arange(0, BLOCK_M)
        at_q, at_do, at_item = place_items(items, None, of.order, stride, first, g, T, OVER_PREFIX, LINEAR, WIDE, GROUP)
        dk, dv = dkv_step(
            dk, dv, k, v, of, at_q, at_do, at_item, None, None, scale, NEED_K, NEED_V,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, masked_count(tiles, BLOCK_E), 1, num_stages=STAGES):
        items = masked_start(i, tiles, BLOCK_E) + tl.arange(0, BLOCK_E)
        live = items < hi
        at_q, at_do, at_item = place_items(items, live, of.order, stride, first, g, T, OVER_PREFIX, LINEAR, WIDE, GROUP)
        if OVER_PREFIX:
            lower, upper = readers_of_slot(j, source, readers, P, ptr, GROUP)
        else:
            lower, upper = readers_of_key(j, n, readers, reach, CAUSAL, CHUNKED, GROUP)
        seen = (items[None, :] >= lower[:, None]) & (items[None, :] <= upper[:, None])
        dk, dv = dkv_step(
            dk, dv, k, v, of, at_q, at_do, at_item, live, seen, scale, NEED_K, NEED_V,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def token_program(
    program, ptr, stride, scale, B, G, T, S, reach, STAGES: tl.constexpr,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N keys of a row, over the items that see them."""
    row = program % B
    g = (program // B) % G
    j_first = program // (B * G) * BLOCK_N
    j = j_first + tl.arange(0, BLOCK_N)
    q_start, t_count, k_start, n = row_extent(row, ptr, T, S)
    stored = n if PACKED else S
    # Bounds increase with j, so those of the first and the last existing key determine which tiles need a mask.
    last = tl.maximum(tl.minimum(j_first + BLOCK_N, n) - 1, j_first)
    lower_min, upper_min = readers_of_key(j_first, n, t_count, reach, CAUSAL, CHUNKED, GROUP)
    lower_max, upper_max = readers_of_key(last, n, t_count, reach, CAUSAL, CHUNKED, GROUP)
    upper_max = tl.where(j_first < n, upper_max, -1)
    tiles = span(lower_min, lower_max, upper_min, upper_max, False, BLOCK_M)
    row64 = tl.cast(row, tl.int64)
    g64 = tl.cast(g, tl.int64)
    k0 = tl.cast(k_start, tl.int64)
    k_base = ptr.k + row64 * stride.k.row + k0 * stride.k.item + g64 * stride.k.head
    v_base = ptr.v + row64 * stride.v.row + k0 * stride.v.item + g64 * stride.v.head
    k = load_rows(tile_pointers(k_base, j_first, stride.k.item, BLOCK_D, BLOCK_N), j < n, HEAD_DIM, BLOCK_D)
    v = load_rows(tile_pointers(v_base, j_first, stride.v.item, BLOCK_V, BLOCK_N), j < n, VALUE_DIM, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    of = Items(
        ptr.q + row64 * stride.q.row, ptr.grad_out + row64 * stride.grad_out.row, ptr.lse2 + row64 * stride.delta.row,
        ptr.delta + row64 * stride.delta.row, None,
    )  # fmt: skip
    dk, dv = collect_dkv(
        dk, dv, k, v, j, n, row, q_start, t_count, tiles, g, of, ptr, stride, scale, T, 0, reach, STAGES,
        False, CAUSAL, CHUNKED, LINEAR, WIDE, ptr.dk is not None, ptr.dv is not None, GROUP,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_E, PRECISION,
    )  # fmt: skip
    keep = j < stored
    mask = ptr.key_mask
    if mask is not None:
        mask += row64 * S
    exists = key_exists(j, None, n, mask)
    if ptr.dk is not None:
        offsets = row64 * stride.dk.row + (k0 + j) * stride.dk.item + g64 * stride.dk.head
        store_items(ptr.dk, offsets, tl.where(exists[:, None], dk * scale.dk, 0.0), keep, HEAD_DIM, BLOCK_D)
    if ptr.dv is not None:
        offsets = row64 * stride.dv.row + (k0 + j) * stride.dv.item + g64 * stride.dv.head
        store_items(ptr.dv, offsets, tl.where(exists[:, None], dv, 0.0), keep, VALUE_DIM, BLOCK_V)


@triton.jit
def prefix_program(
    program, ptr, stride, scale, G, T, A, P, count, parts, STAGES: tl.constexpr,
    SHARED: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N slots of a prefix, over one part of the items that see them."""
    part = program % parts
    a = (program // parts) % A
    g = (program // (parts * A)) % G
    j_first = program // (parts * A * G) * BLOCK_N
    j = j_first + tl.arange(0, BLOCK_N)
    length = prefix_length(a, ptr, A, P)
    first, readers = group_extent(a, a < A, ptr, T, count, SHARED)
    last = tl.maximum(tl.minimum(j_first + BLOCK_N, length) - 1, j_first)
    lower_min, upper_min = readers_of_slot(j_first, a, readers, P, ptr, GROUP)
    lower_max, upper_max = readers_of_slot(last, a, readers, P, ptr, GROUP)
    upper_max = tl.where(j_first < length, upper_max, -1)
    tiles = share(span(lower_min, lower_max, upper_min, upper_max, False, BLOCK_M), part, parts, BLOCK_M)
    a64 = tl.cast(a, tl.int64)
    g64 = tl.cast(g, tl.int64)
    k_base = ptr.prefix_k + a64 * stride.prefix_k.row + g64 * stride.prefix_k.head
    v_base = ptr.prefix_v + a64 * stride.prefix_v.row + g64 * stride.prefix_v.head
    k_ptrs = tile_pointers(k_base, j_first, stride.prefix_k.item, BLOCK_D, BLOCK_N)
    v_ptrs = tile_pointers(v_base, j_first, stride.prefix_v.item, BLOCK_V, BLOCK_N)
    k = load_rows(k_ptrs, j < length, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptrs, j < length, VALUE_DIM, BLOCK_V)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    of = Items(ptr.q, ptr.grad_out, ptr.lse2, ptr.delta, ptr.order)
    dk, dv = collect_dkv(
        dk, dv, k, v, j, length, a, first, readers, tiles, g, of, ptr, stride, scale, T, P, None, STAGES,
        True, False, False, LINEAR, WIDE, ptr.part_k is not None, ptr.part_v is not None, GROUP,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_E, PRECISION,
    )  # fmt: skip
    exists = (j < length)[:, None]
    row = a64 + tl.cast(part, tl.int64) * A
    if ptr.part_k is not None:
        offsets = row * stride.part_k.row + j * stride.part_k.item + g64 * stride.part_k.head
        store_items(ptr.part_k, offsets, tl.where(exists, dk * scale.dk, 0.0), j < P, HEAD_DIM, BLOCK_D)
    if ptr.part_v is not None:
        offsets = row * stride.part_v.row + j * stride.part_v.item + g64 * stride.part_v.head
        store_items(ptr.part_v, offsets, tl.where(exists, dv, 0.0), j < P, VALUE_DIM, BLOCK_V)


@triton.jit(do_not_specialize=[*SIZES, "count", "parts", "prefix_programs"])
def dkv_kernel(
    ptr, stride, scale, B, G, T, S, A, P, reach, count, parts, prefix_programs,
    OVER_PREFIX: tl.constexpr, OVER_TOKENS: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    CHUNKED: tl.constexpr, SHARED: tl.constexpr, LINEAR: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
    PREFIX_M: tl.constexpr, PREFIX_N: tl.constexpr, PREFIX_E: tl.constexpr, PREFIX_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if OVER_PREFIX:  # noqa: SIM102 (decided when compiling; the next, by each program)
        if program < prefix_programs:
            prefix_program(
                program, ptr, stride, scale, G, T, A, P, count, parts, PREFIX_STAGES, SHARED, LINEAR, WIDE, GROUP,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PREFIX_M, PREFIX_N, PREFIX_E, PRECISION,
            )  # fmt: skip
    if OVER_TOKENS:  # noqa: SIM102
        if program >= prefix_programs:
            token_program(
                program - prefix_programs, ptr, stride, scale, B, G, T, S, reach, STAGES,
                PACKED, CAUSAL, CHUNKED, LINEAR, WIDE, GROUP,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
            )  # fmt: skip


def parts_of_prefix(p: Problem) -> int:
    """The number of parts: at most one per tile of items, and no more programs than fill the device."""
    tile = p.tile("dkv_prefix")
    most = triton.cdiv(p.tokens * p.group, tile.step * p.A)
    return max(1, min(most, WAVES * p.target.units // max(triton.cdiv(p.P, tile.own) * p.G * p.A, 1)))


def plan_dkv(p: Problem, wanted: list[str]) -> tuple[dict[str, Memory], list[Readers], Launch]:
    """`wanted`: those of dk, dv, dprefix_k, dprefix_v to compute. If the prefix's are split into parts, part_k and
    part_v are allocated."""
    readers = Readers(p, by_position=True)
    tile, prefix_tile = p.tile("dkv"), p.tile("dkv_prefix")
    over_tokens = "dk" in wanted or "dv" in wanted
    slots = [name for name in SLOTS if f"d{name}" in wanted]
    parts = parts_of_prefix(p) if slots else 1
    prefix_programs = triton.cdiv(p.P, prefix_tile.own) * p.G * p.A * parts if slots else 0
    token_programs = triton.cdiv(p.S_max, tile.own) * p.G * p.B if over_tokens else 0
    memory = {f"d{name}": p.like[name] for name in ("k", "v", *SLOTS) if f"d{name}" in wanted}
    pointers = p.pointers(*READ, *(name for name in ("dk", "dv") if name in wanted))
    stride = p.strides("q", "k", "v", "prefix_k", "prefix_v", "grad_out", "delta", "dk", "dv")
    for name in slots:
        part = name.replace("prefix", "part")
        if parts > 1:
            memory[part] = contiguous((parts, *p.like[name].shape))
            pointers[part] = part
            stride = stride._replace(**{part: Strides(*memory[part].stride[1:4])})
        else:
            pointers[part] = f"d{name}"
            stride = stride._replace(**{part: Strides(*p.like[name].stride[:3])})
    if slots:
        pointers |= {name: name for name in readers.fields}
    launch = Launch(
        dkv_kernel, prefix_programs + token_programs, tile if over_tokens else prefix_tile, pointers,
        stride=stride, scale=p.scales, **p.sizes, **p.dims, count=p.tokens, parts=parts,
        prefix_programs=prefix_programs,
        OVER_PREFIX=bool(slots), OVER_TOKENS=over_tokens, PACKED=p.packed, CAUSAL=p.is_causal, CHUNKED=p.chunked,
        SHARED=p.shared, LINEAR=p.linear, WIDE=p.wide, BLOCK_M=tile.step, BLOCK_N=tile.own, BLOCK_E=tile.edge,
        STAGES=tile.stages, PREFIX_M=prefix_tile.step, PREFIX_N=prefix_tile.own, PREFIX_E=prefix_tile.edge,
        PREFIX_STAGES=prefix_tile.stages,
    )  # fmt: skip
    return memory, [readers] if slots and readers.fields else [], launch
