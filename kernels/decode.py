"""Decoding: few queries per row (T ≤ 16), many keys. The keys are split into parts; each part is attended to
separately, then the parts are merged.

    out = Σ_part exp(lse_part − lse) out_part,     lse = ln(Σ_part exp(lse_part) + exp(sink))

One launch has two kinds of programs. *Prefix programs* take a tile of items from all rows that read the same prefix,
with queries of the whole batch packed with the heads of the group, so that a shared prefix is read once for the batch
(P + ΣS key rows instead of B·P + ΣS) and matrix units get full tiles. *Token programs* take one row's items over a part
of its own keys. A second kernel merges the parts in a fixed order. If splitting gains nothing, the forward kernel runs
in a single launch instead.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, A prefixes, D head dim, U flat
tokens.
"""

import triton
import triton.language as tl

from softkv.kernels.forward import plan_forward
from softkv.kernels.geometry import (
    item_offset,
    item_pointers,
    items_of_block,
    load_rows,
    prefix_length,
    row_extent,
    share,
    store_items,
    token_offset,
)
from softkv.kernels.keys import Segment, slots_seen, tokens_seen
from softkv.kernels.launch import Launch, Plan
from softkv.kernels.problem import SIZES, Problem, contiguous
from softkv.kernels.readers import Readers, group_extent
from softkv.kernels.softmax import LOG2E, LOWEST, attend, finish
from softkv.kernels.tiles import block_d

MOST_QUERIES = 16  # queries per row up to which the decode kernels are used
MOST_PARTS = 64  # parts of either kind
WAVES = 2  # target number of programs per multiprocessor, of either kind
FEW_TILES = 4  # of keys: so many a single program may process, even if the rest of the device is idle
LAUNCH_BYTES = 4 << 20  # read by the device in the time of a second launch
POINTERS = (
    "q", "k", "v", "prefix_k", "prefix_v", "cu_seqlens_q", "cu_seqlens_k", "key_lengths", "key_mask", "prefix_index",
    "prefix_lengths", "position", "part_out", "part_lse",
)  # fmt: skip


@triton.jit
def find_group(
    block, ptr, T, count, groups,
    SHARED: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """(prefix, first token, tokens, first item) of a block: item tiles are assigned to groups in order; past the last
    group there are no tokens. BLOCK_A is a power of two, at least the number of groups."""
    a = tl.arange(0, BLOCK_A)
    start, size = group_extent(a, a < groups, ptr, T, count, SHARED)
    blocks = tl.cdiv(size * GROUP, BLOCK_M)
    done = tl.cumsum(blocks, 0)
    here = (done > block) & (done - blocks <= block)
    item = tl.sum(tl.where(here, block - done + blocks, 0), 0) * BLOCK_M
    return (
        tl.sum(tl.where(here, a, 0), 0),
        tl.sum(tl.where(here, start, 0), 0),
        tl.sum(tl.where(here, size, 0), 0),
        item,
    )


@triton.jit
def attend_part(
    q, keys, part, parts, ptr, at, live, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the part-th share of a segment of keys; items are stored at offsets `at` (in head vectors)."""
    tiles = share(keys.tiles, part, parts, BLOCK_N)
    own = Segment(keys.k, keys.v, keys.k_stride, keys.v_stride, keys.lower, keys.upper, keys.mask, tiles)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc, m, l = attend(acc, m, l, q, own, scale, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, BLOCK_E, PRECISION)
    acc, total = finish(acc, m, l, None)
    store_items(ptr.part_out, at * VALUE_DIM, acc, live, VALUE_DIM, BLOCK_V)
    tl.store(ptr.part_lse + at, total, mask=live)


@triton.jit
def prefix_program(
    program, ptr, stride, scale, G, T, A, P, reach, count, groups, parts,
    PACKED: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = program % parts
    g = (program // parts) % G
    block = program // (parts * G)
    if SHARED:
        a, first, readers, item = 0, 0, count, block * BLOCK_M
    else:
        a, first, readers, item = find_group(block, ptr, T, count, groups, SHARED, GROUP, BLOCK_M, BLOCK_A)
    item = item + tl.arange(0, BLOCK_M)
    live = item < readers * GROUP
    token = first + item // GROUP
    if ptr.order is not None:
        token = tl.load(ptr.order + token, mask=live, other=0)
    head = tl.cast(g, tl.int64) * GROUP + item % GROUP
    q_at = token_offset(stride.q, token, head, T, PACKED)
    q = load_rows(item_pointers(ptr.q, q_at, BLOCK_D), live, HEAD_DIM, BLOCK_D)
    length = prefix_length(a, ptr, A, P)
    keys = slots_seen(token, live, tl.minimum(a, A - 1), length, g, ptr, stride, reach, BLOCK_N)
    at = (tl.cast(part, tl.int64) * count + token) * (G * GROUP) + head
    attend_part(
        q, keys, part, parts, ptr, at, live, scale,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip


@triton.jit
def token_program(
    program, ptr, stride, scale, B, G, T, S, reach, count, first_part, parts,
    CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = program % parts
    row = (program // parts) % B
    g = (program // (parts * B)) % G
    block = program // (parts * B * G)
    q_start, t_count, k_start, n = row_extent(row, ptr, T, S)
    live, token, head = items_of_block(block, q_start, t_count, g, GROUP, BLOCK_M)
    q = load_rows(item_pointers(ptr.q, item_offset(stride.q, row, token, head), BLOCK_D), live, HEAD_DIM, BLOCK_D)
    keys = tokens_seen(
        block, row, g, t_count, k_start, n, S, ptr, stride, reach, CAUSAL, CHUNKED, GROUP, BLOCK_M, BLOCK_N
    )
    flat = tl.cast(row, tl.int64) * T + token
    at = (tl.cast(first_part + part, tl.int64) * count + flat) * (G * GROUP) + head
    attend_part(
        q, keys, part, parts, ptr, at, live, scale,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "count", "groups", "prefix_parts", "token_parts", "prefix_programs"])
def decode_kernel(
    ptr, stride, scale, B, G, T, S, A, P, reach, count, groups, prefix_parts, token_parts, prefix_programs,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, CHUNKED: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_A: tl.constexpr, PREFIX_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial outputs [parts, U, H, D] and lse [parts, U, H]: first the prefix's parts, then the tokens'."""
    program = tl.program_id(0)
    if ptr.prefix_k is not None:  # noqa: SIM102 (decided when compiling; the next, by each program)
        if program < prefix_programs:
            prefix_program(
                program, ptr, stride, scale, G, T, A, P, reach, count, groups, prefix_parts, PACKED, SHARED, GROUP,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_A, PREFIX_M, BLOCK_N, BLOCK_E, PRECISION,
            )  # fmt: skip
    if program >= prefix_programs:
        token_program(
            program - prefix_programs, ptr, stride, scale, B, G, T, S, reach, count, prefix_parts, token_parts,
            CAUSAL, CHUNKED, GROUP, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "count", "parts"])
def merge_kernel(
    ptr, stride, T, H, count, parts,
    PACKED: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge the parts of M items by a running softmax over their lse. Here an item is (flat token, head)."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.cast(count, tl.int64) * H
    live = item < total
    head = item % H
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    lse_ptr = ptr.part_lse
    out_ptr = ptr.part_out
    for _ in range(parts):
        part_lse = tl.load(lse_ptr + item, mask=live, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, part_lse)
        a = tl.exp2(m - m_new)
        p = tl.exp2(part_lse - m_new)
        part = load_rows(item_pointers(out_ptr, item * VALUE_DIM, BLOCK_V), live, VALUE_DIM, BLOCK_V)
        acc = acc * a[:, None] + p[:, None] * part
        l = l * a + p
        m = m_new
        lse_ptr += total
        out_ptr += total * VALUE_DIM
    sink = None
    if ptr.sinks is not None:
        sink = tl.load(ptr.sinks + head, mask=live, other=0).to(tl.float32)
    acc, log_sum = finish(acc, m, l, sink)
    token = item // H
    store_items(ptr.out, token_offset(stride.out, token, head, T, PACKED), acc, live, VALUE_DIM, BLOCK_V)
    tl.store(ptr.lse + token_offset(stride.lse, token, head, T, PACKED), log_sum, mask=live)


def parts_of(keys: int, programs: int, block: int, units: int) -> int:
    """The number of parts of the keys: enough programs to fill the device, but at least one tile per part."""
    return max(1, min(triton.cdiv(keys, block), triton.cdiv(WAVES * units, max(programs, 1)), MOST_PARTS))


def one_pass_will_do(p: Problem, programs: int, token_parts: int) -> bool:
    """Whether one program per row and head, which reads prefix and tokens, is no slower than parts and a merge: no
    multiprocessor is idle or there are few tiles, and re-reading a shared prefix for every row takes less time than a
    launch."""
    step = p.tile("decode").step
    walk = triton.cdiv(p.P, step) + triton.cdiv(p.S_max, step)
    again = max(p.B - p.A, 0) * p.P * p.G * (p.D + p.value_dim) * p.dtype.itemsize
    filled = programs >= WAVES * p.target.units
    return (filled or walk <= FEW_TILES or (token_parts == 1 and p.P == 0)) and again <= LAUNCH_BYTES


def plan_decode(p: Problem) -> Plan:
    """Like `plan_forward`, for rows with few queries."""
    tile, prefix_tile, units = p.tile("decode"), p.tile("decode_prefix"), p.target.units
    blocks = triton.cdiv(p.T_max * p.group, tile.own)
    programs = blocks * p.G * p.B
    token_parts = parts_of(p.S_max, programs, tile.step, units)
    if one_pass_will_do(p, programs, token_parts):
        return plan_forward(p, "decode")
    pointers, steps = p.pointers(*POINTERS), p.preparations()
    groups, prefix_parts, prefix_programs = 1, 0, 0
    if p.P:
        readers = Readers(p, by_position=False)
        items = p.tokens * p.group
        prefix_blocks = triton.cdiv(items, prefix_tile.own)
        if not p.shared:  # each group may end in a partly filled tile
            groups = readers.count
            prefix_blocks = min(items, prefix_blocks + groups)
        if readers.fields:
            pointers |= {name: name for name in readers.fields}
            steps.append(readers)
        prefix_parts = parts_of(p.P, prefix_blocks * p.G, tile.step, units)
        prefix_programs = prefix_blocks * p.G * prefix_parts
    parts = prefix_parts + token_parts
    memory = {name: p.like[name] for name in ("out", "lse")}
    memory |= {
        "part_out": contiguous((parts, p.tokens, p.H, p.value_dim)),
        "part_lse": contiguous((parts, p.tokens, p.H)),
    }
    attend_parts = Launch(
        decode_kernel, prefix_programs + programs * token_parts, tile, pointers,
        stride=p.strides("q", "k", "v", "prefix_k", "prefix_v"), scale=p.scales, **p.sizes, **p.dims, count=p.tokens,
        groups=groups, prefix_parts=prefix_parts, token_parts=token_parts, prefix_programs=prefix_programs,
        PACKED=p.packed, CAUSAL=p.is_causal, CHUNKED=p.chunked, SHARED=p.shared,
        BLOCK_A=triton.next_power_of_2(groups), PREFIX_M=prefix_tile.own, BLOCK_M=tile.own, BLOCK_N=tile.step,
        BLOCK_E=tile.edge,
    )  # fmt: skip
    merge = p.tile("merge")
    merge_parts = Launch(
        merge_kernel, triton.cdiv(p.tokens * p.H, merge.own), merge,
        p.pointers("part_out", "part_lse", "sinks", "out", "lse"), stride=p.strides("out", "lse"), T=p.T, H=p.H,
        count=p.tokens, parts=parts, PACKED=p.packed, VALUE_DIM=p.value_dim, BLOCK_V=block_d(p.value_dim),
        BLOCK_M=merge.own,
    )  # fmt: skip
    return Plan(memory, [*steps, attend_parts, merge_parts], ("out", "lse"))
