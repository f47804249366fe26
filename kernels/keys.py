"""The keys that a program's items may see: the slots of a prefix, then the tokens of a row.

Both are a `Segment` of keys to the passes that iterate over keys (forward, dq, decode).

Axes: M items (query tokens × heads of the group), T query tokens, n keys of a row, P slots, D head dim.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from softkv.kernels.geometry import span


class Segment(NamedTuple):
    """Keys j relative to the base pointers. An item sees those with `lower ≤ j ≤ upper` that `mask` does not hide."""

    k: Any
    v: Any
    k_stride: Any  # from key to key
    v_stride: Any
    lower: Any  # [M], or None: from the first
    upper: Any  # [M]
    mask: Any  # pointer to one int16 per key, or None
    tiles: Any  # the tiles to visit, from `span`


@triton.jit
def slots_seen(token, live, a, length, g, ptr, stride, window, BLOCK_N: tl.constexpr):
    """The slots of prefix `a` that items of flat tokens `token` [M] see: all, unless a window covers the prefix."""
    upper = tl.cast(token * 0, tl.int32) + (length - 1)
    if ptr.position is not None:
        position = tl.load(ptr.position + token, mask=live, other=0)
        lower = tl.maximum(position - window + 1 + length, 0)
        first = tl.minimum(tl.min(tl.where(live, lower, length), 0), length)
        tiles = span(first, tl.max(tl.where(live, lower, 0), 0), length - 1, length - 1, False, BLOCK_N)
    else:
        lower = None
        tiles = span(0, 0, length - 1, length - 1, False, BLOCK_N)
    a64 = tl.cast(a, tl.int64)
    g64 = tl.cast(g, tl.int64)
    k = ptr.prefix_k + a64 * stride.prefix_k.row + g64 * stride.prefix_k.head
    v = ptr.prefix_v + a64 * stride.prefix_v.row + g64 * stride.prefix_v.head
    return Segment(k, v, stride.prefix_k.item, stride.prefix_v.item, lower, upper, None, tiles)


@triton.jit
def first_seen(position, reach, CHUNKED: tl.constexpr):
    """The first key within the window or chunk of a query at key position `position`."""
    if CHUNKED:
        return tl.maximum(position, 0) // reach * reach
    else:
        return position - reach + 1


@triton.jit
def tokens_seen(
    block, row, g, T, k_start, n, S, ptr, stride, reach,
    CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys that the items of a block see, in a row of T queries and n keys."""
    t = (block * BLOCK_M + tl.arange(0, BLOCK_M)) // GROUP
    if CAUSAL:
        upper = n - T + t
        # Blocks past the end of a short row read nothing.
        upper_min = n - T + tl.minimum(block * BLOCK_M // GROUP, T - 1)
        upper_max = n - T + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, T - 1)
    else:
        upper = t * 0 + (n - 1)
        upper_min = n - 1
        upper_max = n - 1
    if reach is not None:
        lower = first_seen(upper, reach, CHUNKED)
        lower_min = tl.maximum(first_seen(upper_min, reach, CHUNKED), 0)
        lower_max = tl.maximum(first_seen(upper_max, reach, CHUNKED), 0)
    else:
        lower = None
        lower_min = 0
        lower_max = 0
    row64 = tl.cast(row, tl.int64)
    g64 = tl.cast(g, tl.int64)
    first = tl.cast(k_start, tl.int64)
    k = ptr.k + row64 * stride.k.row + first * stride.k.item + g64 * stride.k.head
    v = ptr.v + row64 * stride.v.row + first * stride.v.item + g64 * stride.v.head
    mask = ptr.key_mask
    if mask is not None:
        mask += row64 * S
    tiles = span(lower_min, lower_max, upper_min, upper_max, mask is not None, BLOCK_N)
    return Segment(k, v, stride.k.item, stride.v.item, lower, upper, mask, tiles)


@triton.jit
def key_exists(j, lower, hi, mask):
    """[N] keys that some item of the program may see. Others are not loaded, because they may contain NaN."""
    exists = j < hi
    if lower is not None:
        exists = exists & (j >= tl.min(lower, 0))
    if mask is not None:
        exists = exists & (tl.load(mask + j, mask=exists, other=0) != 0)
    return exists


@triton.jit
def visible(j, exists, keys):
    """[M, N]: whether each item may see the keys `j` [N]."""
    seen = exists[None, :] & (j[None, :] <= keys.upper[:, None])
    if keys.lower is not None:
        seen = seen & (j[None, :] >= keys.lower[:, None])
    return seen
