"""The keys that a program's items may see: the slots of a prefix, then the tokens of a row.

Both are one *stretch* of keys to the passes that walk keys (forward, dq, decode), a tuple

    (k, v, k_stride, v_stride, lower, upper, tiles)

of base pointers, strides from key to key, each item's bounds [M] (`lower` counts only where the caller says BOUNDED), and the
tiles to visit, cut by `span`.

Axes: M items (query tokens × heads of the group), T query tokens, n keys of a row, P slots, D head dim.
"""

import triton
import triton.language as tl

from softkv.kernels.geometry import span


@triton.jit
def slots_seen(
    token, live, a, length, g, prefix_k, prefix_v, prefix, window, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Slots of prefix `a` that items of flat tokens `token` [M] see: all, unless a window covers the prefix."""
    upper = tl.cast(token * 0, tl.int32) + (length - 1)
    lower = upper
    if prefix.position is not None:
        position = tl.load(prefix.position + token, mask=live, other=0)
        lower = tl.maximum(position - window + 1 + length, 0)
        first = tl.minimum(tl.min(tl.where(live, lower, length), 0), length)
        tiles = span(first, tl.max(tl.where(live, lower, 0), 0), length - 1, length - 1, False, BLOCK_N)
    else:
        tiles = span(0, 0, length - 1, length - 1, False, BLOCK_N)
    a64 = tl.cast(a, tl.int64)
    g64 = tl.cast(g, tl.int64)
    return (
        prefix_k.ptr + a64 * prefix_k.row + g64 * prefix_k.head, prefix_v.ptr + a64 * prefix_v.row + g64 * prefix_v.head,
        prefix_k.item, prefix_v.item, lower, upper, tiles,
    )  # fmt: skip


@triton.jit
def tokens_seen(
    block, row, g, T, k_start, n, k, v, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys of a row of T queries and n keys that the items of a block see."""
    t = (block * BLOCK_M + tl.arange(0, BLOCK_M)) // GROUP
    if CAUSAL:
        upper = n - T + t
        upper_min = (
            n - T + tl.minimum(block * BLOCK_M // GROUP, T - 1)
        )  # a block past a short row reads nothing past it
        upper_max = n - T + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, T - 1)
    else:
        upper = t * 0 + (n - 1)
        upper_min = n - 1
        upper_max = n - 1
    lower = upper
    if window is not None:
        lower = upper - window + 1
        lower_min = tl.maximum(upper_min - window + 1, 0)
        lower_max = tl.maximum(upper_max - window + 1, 0)
    else:
        lower_min = 0
        lower_max = 0
    row64 = tl.cast(row, tl.int64)
    g64 = tl.cast(g, tl.int64)
    first = tl.cast(k_start, tl.int64)
    return (
        k.ptr + row64 * k.row + first * k.item + g64 * k.head, v.ptr + row64 * v.row + first * v.item + g64 * v.head,
        k.item, v.item, lower, upper, span(lower_min, lower_max, upper_min, upper_max, MASKED, BLOCK_N),
    )  # fmt: skip


@triton.jit
def visible(j, lower, upper):
    """[M, N] which keys `j` [N] an item may see, by its bounds [M]."""
    seen = j[None, :] <= upper[:, None]
    if lower is not None:
        seen = seen & (j[None, :] >= lower[:, None])
    return seen


@triton.jit
def key_exists(j, lower, hi, mask_ptr):
    """[N] keys that some item of the program may see. What nobody sees is not loaded: it may hold anything."""
    exists = j < hi
    if lower is not None:
        exists = exists & (j >= tl.min(lower, 0))
    if mask_ptr is not None:
        exists = exists & (tl.load(mask_ptr + j, mask=exists, other=0) != 0)
    return exists
