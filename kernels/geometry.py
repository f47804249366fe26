"""Index arithmetic: rows, prefixes, and the tiles of keys (or of queries) that a program must visit.

The same conventions hold in every kernel, dense or packed. A *row* of the batch has queries t < T and keys j < n; its
query t is at key position n − T + t. The H/G query heads that share a key/value head are packed with the queries into
*items*: item i of (row, g) is query i // GROUP of head g·GROUP + i % GROUP, GROUP = H/G. One load of a key tile thus
serves all of them, and short rows still fill a tile.

Visibility is always an interval: an item sees keys `lower ≤ j ≤ upper`, and a key is seen by items `lower ≤ i ≤ upper`.
`span` divides the visited tiles into those that need a mask (both edges) and those that don't.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P prefix slots, A prefixes, D head dim.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Operands(NamedTuple):
    """One field per tensor of a call. Kernels take two of these: `ptr`, the addresses, and `stride`, the `Strides` of
    those that have any. None: not used by the kernel, or not given in the call."""

    q: Any = None
    k: Any = None
    v: Any = None
    prefix_k: Any = None
    prefix_v: Any = None
    sinks: Any = None
    cu_seqlens_q: Any = None  # [rows + 1], packed rows
    cu_seqlens_k: Any = None
    key_lengths: Any = None  # [B] of partly filled caches
    key_mask: Any = None  # [B, S] as int16
    prefix_index: Any = None  # [B]; without it row b reads prefix b, or the only one
    prefix_lengths: Any = None  # [A]
    position: Any = None  # [tokens], if the window covers the prefix: the query's position relative to slot P
    order: Any = None  # group a of the tokens, those that read prefix a, is order[start[a] : start[a + 1]]
    start: Any = None
    seen: Any = None  # [A, P], if a group is sorted by position: the number of its tokens that see a slot
    out: Any = None
    lse: Any = None
    grad_out: Any = None
    grad_lse: Any = None
    lse2: Any = None  # the base-2 lse, [H, tokens]
    delta: Any = None  # Δ of the backward, with the layout of lse2
    dq: Any = None
    dk: Any = None
    dv: Any = None
    dprefix_k: Any = None
    dprefix_v: Any = None
    part_k: Any = None  # fp32 partial sums of dprefix_k, [parts, A, G, P, D]
    part_v: Any = None
    part_out: Any = None  # [parts, tokens, H, D]
    part_lse: Any = None


class Strides(NamedTuple):
    """Strides in elements; that of the last axis is 1. Packed tensors and shared prefixes have `row` = 0."""

    row: Any  # from row to row of the batch, or from prefix to prefix
    head: Any
    item: Any  # from token to token, or from slot to slot


class Scale(NamedTuple):
    """Factors. `score`: from raw scores to base-2 exponents. `softcap`: from products to the argument of tanh, or None.
    `dq`, `dk`: on ds k and dsᵀ q."""

    score: Any
    softcap: Any
    dq: Any
    dk: Any


@triton.jit
def row_extent(row, ptr, T, S):
    """(first query token, number of queries, first key token, number of keys) of a row."""
    if ptr.cu_seqlens_q is not None:
        q_start = tl.load(ptr.cu_seqlens_q + row)
        k_start = tl.load(ptr.cu_seqlens_k + row)
        t_count = tl.load(ptr.cu_seqlens_q + row + 1) - q_start
        return q_start, t_count, k_start, tl.load(ptr.cu_seqlens_k + row + 1) - k_start
    elif ptr.key_lengths is not None:
        n = tl.load(ptr.key_lengths + row).to(tl.int32)
        return 0, T, 0, tl.minimum(tl.maximum(n, 0), S)
    else:
        return 0, T, 0, S


@triton.jit
def prefix_length(a, ptr, A, P):
    """The number of slots of prefix `a`; 0 for an index out of range."""
    known = (a >= 0) & (a < A)
    if ptr.prefix_lengths is not None:
        length = tl.load(ptr.prefix_lengths + a, mask=known, other=0).to(tl.int32)
        return tl.minimum(tl.maximum(length, 0), P)
    else:
        return tl.where(known, P, 0)


@triton.jit
def prefix_of_row(row, ptr, A, P, SHARED: tl.constexpr):
    """The prefix that a row reads, and its length."""
    if ptr.prefix_index is not None:
        a = tl.load(ptr.prefix_index + row)
    elif SHARED:
        a = row * 0
    else:
        a = row
    length = prefix_length(a, ptr, A, P)
    return tl.where(length > 0, a, 0).to(tl.int32), length


@triton.jit
def block_of_program(B, G):
    """(row, kv-head, block of items) of a program: a row's last block first, neighbours on the same kv-head."""
    program = tl.program_id(0)
    return program % B, (program // B) % G, tl.num_programs(0) // (B * G) - 1 - program // (B * G)


@triton.jit
def items_of_block(block, q_start, t_count, g, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(whether it exists, query token, query head) of each item [BLOCK_M] of a block."""
    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.cast(q_start, tl.int64) + item // GROUP
    return item < t_count * GROUP, token, tl.cast(g, tl.int64) * GROUP + item % GROUP


@triton.jit
def item_offset(stride, row, token, head):
    """Offset of items by row, token of the row (of the batch if packed), and head."""
    return tl.cast(row, tl.int64) * stride.row + token * stride.item + head * stride.head


@triton.jit
def token_offset(stride, token, head, T, PACKED: tl.constexpr):
    """Offset of items by flat token (b·T + t when dense, the packed position otherwise) and head."""
    if PACKED:
        at = tl.cast(token, tl.int64) * stride.item
    else:
        at = tl.cast(token // T, tl.int64) * stride.row + tl.cast(token % T, tl.int64) * stride.item
    return at + head * stride.head


@triton.jit
def span(lower_min, lower_max, upper_min, upper_max, MASK_ALL: tl.constexpr, BLOCK: tl.constexpr):
    """(lo, full_lo, full_hi, hi): tiles from lo to hi; those in [full_lo, full_hi) are fully visible."""
    lo = (lower_min // BLOCK) * BLOCK
    hi = upper_max + 1
    if MASK_ALL:
        return lo, lo, lo, hi
    else:
        full_lo = tl.cdiv(lower_max, BLOCK) * BLOCK
        full_hi = ((upper_min + 1) // BLOCK) * BLOCK
        whole = full_lo < full_hi
        return lo, tl.where(whole, full_lo, lo), tl.where(whole, full_hi, lo), hi


@triton.jit
def share(tiles, part, parts, BLOCK: tl.constexpr):
    """Split a span into `parts` runs of whole tiles and return the part-th."""
    lo, full_lo, full_hi, hi = tiles
    run = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK), parts) * BLOCK
    first = lo + part * run
    last = tl.minimum(first + run, hi)
    last = tl.maximum(last, first)
    full_lo = tl.minimum(tl.maximum(full_lo, first), last)
    full_hi = tl.minimum(tl.maximum(full_hi, first), last)
    return first, full_lo, full_hi, last


@triton.jit
def masked_start(i, tiles, BLOCK: tl.constexpr):
    """Start of the i-th tile that needs a mask: first those left of the full ones, then those right of them."""
    lo, full_lo, full_hi, _ = tiles
    return lo + i * BLOCK + tl.where(lo + i * BLOCK >= full_lo, full_hi - full_lo, 0)


@triton.jit
def masked_count(tiles, BLOCK: tl.constexpr):
    lo, full_lo, full_hi, hi = tiles
    return tl.cdiv(full_lo - lo, BLOCK) + tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK)


@triton.jit
def tile_offsets(stride, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK_D] consecutive rows. Unsigned, so that the high halves of the addresses need no registers."""
    return tl.cast(tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :], tl.uint32)


@triton.jit
def tile_pointers(ptr, start, stride, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK_D] consecutive rows from `start`."""
    return ptr + tl.cast(start, tl.int64) * stride + tile_offsets(stride, BLOCK_D, BLOCK)


@triton.jit
def load_rows(ptrs, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the rows of a tile that exist, given by `exists` [BLOCK]; None: all."""
    if HEAD_DIM != BLOCK_D:
        keep = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if exists is not None:
            keep = keep & exists[:, None]
        return tl.load(ptrs, mask=keep, other=0.0)
    elif exists is not None:
        return tl.load(ptrs, mask=exists[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def item_pointers(ptr, offsets, BLOCK_D: tl.constexpr):
    """[items, BLOCK_D]: one head vector per item."""
    return ptr + offsets[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def store_items(ptr, offsets, x, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    keep = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        keep = keep & (d < HEAD_DIM)
    tl.store(ptr + offsets[:, None] + d, x.to(ptr.dtype.element_ty), mask=keep)
