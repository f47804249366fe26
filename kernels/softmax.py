"""The online softmax, in base 2: the only place where scores become weights.

Over key tiles with raw scores r (q kᵀ, or tanh(q kᵀ·scale/c) with a soft cap), `score_scale` = scale·log₂e (or c·log₂e)
and the running maximum m, sum l and output acc of an item:

    m' = max(m, max r · score_scale)      a = 2^(m − m')      p = 2^(r·score_scale − m')
    l' = a·l + Σp                         acc' = a·acc + p v

m starts at a finite, very negative number, so that −∞ − (−∞) never occurs: a hidden key has score −∞ and weight 0, and
an item that sees nothing ends with l = 0, output 0 and lse −∞.

Axes: M items (query tokens × heads of the group), N keys of a tile, D head dim (of values, if it differs).
"""

import triton
import triton.language as tl

from softkv.kernels.geometry import load_rows, masked_count, masked_start, tile_offsets, tile_pointers
from softkv.kernels.keys import key_exists, visible

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.2676506002282294e30)  # −2^100: below every score, far from overflow


@triton.jit
def raw_scores(q, k, softcap_scale, PRECISION: tl.constexpr):
    """q kᵀ [M, N], or with a soft cap tanh(q kᵀ·softcap_scale)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if softcap_scale is not None:
        root = tl.rsqrt(tl.exp2(s * (softcap_scale * 2 * LOG2E)) + 1)
        s = 1 - 2 * root * root  # a division would compare and select for each score
    return s


@triton.jit
def slope(p, s, CAPPED: tl.constexpr):
    """p times the soft cap's slope at the raw scores s, computed before dp, so that s needs no registers afterwards."""
    if CAPPED:
        p = p * (1 - s * s)
    return p


@triton.jit
def softmax_step(
    acc, m, l, q, k_ptrs, v_ptrs, exists, seen, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys. `exists` [N] and `seen` [M, N] are None if every key exists and every item sees it."""
    k = load_rows(k_ptrs, exists, HEAD_DIM, BLOCK_D)
    s = raw_scores(q, k, scale.softcap, PRECISION)
    if seen is not None:
        s = tl.where(seen, s, float("-inf"))
    v = load_rows(v_ptrs, exists, VALUE_DIM, BLOCK_V)
    m_new = tl.maximum(m, tl.max(s, 1) * scale.score)
    a = tl.exp2(m - m_new)
    p = tl.exp2(s * scale.score - m_new[:, None])
    l = l * a + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * a[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def attend(
    acc, m, l, q, keys, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run the softmax over a segment of keys: full tiles of N keys, then the edges, E at a time."""
    _, full_lo, full_hi, hi = keys.tiles
    k_ptrs = keys.k + tl.cast(full_lo, tl.int64) * keys.k_stride
    v_ptrs = keys.v + tl.cast(full_lo, tl.int64) * keys.v_stride
    k_offsets = tile_offsets(keys.k_stride, BLOCK_D, BLOCK_N)
    v_offsets = tile_offsets(keys.v_stride, BLOCK_V, BLOCK_N)
    k_step = tl.cast(BLOCK_N, tl.int64) * keys.k_stride
    v_step = tl.cast(BLOCK_N, tl.int64) * keys.v_stride
    for _start in range(full_lo, full_hi, BLOCK_N):
        acc, m, l = softmax_step(
            acc, m, l, q, k_ptrs + k_offsets, v_ptrs + v_offsets, None, None, scale,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
        k_ptrs += k_step
        v_ptrs += v_step
    for i in range(masked_count(keys.tiles, BLOCK_E)):
        start = masked_start(i, keys.tiles, BLOCK_E)
        j = start + tl.arange(0, BLOCK_E)
        exists = key_exists(j, keys.lower, hi, keys.mask)
        acc, m, l = softmax_step(
            acc, m, l, q, tile_pointers(keys.k, start, keys.k_stride, BLOCK_D, BLOCK_E),
            tile_pointers(keys.v, start, keys.v_stride, BLOCK_V, BLOCK_E), exists, visible(j, exists, keys), scale,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    return acc, m, l


@triton.jit
def finish(acc, m, l, sink):
    """(out, lse): the normalised output, and the natural log of the denominator, including the sink."""
    seen = l > 0
    total = tl.where(seen, l, 1)
    lse = tl.where(seen, m + tl.log2(total), float("-inf"))  # base 2
    weight = 1 / total
    if sink is not None:
        sink2 = sink * LOG2E
        top = tl.maximum(tl.maximum(lse, sink2), LOWEST)
        joint = top + tl.log2(tl.exp2(lse - top) + tl.exp2(sink2 - top))
        weight = tl.where(seen, weight * tl.exp2(lse - joint), 0)
        lse = joint
    return acc * weight[:, None], lse * LN2
