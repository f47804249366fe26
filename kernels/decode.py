"""Decoding: a few queries a row (T ≤ 16), many keys. The keys are cut in parts, each part attended on its own, then merged.

    out = Σ_part exp(lse_part − lse) out_part,     lse = ln(Σ_part exp(lse_part) + exp(sink))

One launch holds two kinds of program. *Prefix programs* take a tile of items from all rows that read the same prefix,
queries of the whole batch packed with the heads of the group, so that a shared prefix is read once for the batch (P + ΣS
key rows instead of B·P + ΣS) and matrix units have whole tiles to work on. *Token programs* take one row's items over a part
of its own keys. A second kernel merges the parts in fixed order.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, A prefixes, D head dim, U flat tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softkv.kernels.geometry import (
    Groups,
    item_offset,
    item_pointers,
    items_of_block,
    load_some,
    prefix_length,
    row_extent,
    share,
    store_items,
    token_offset,
)
from softkv.kernels.keys import slots_seen, tokens_seen
from softkv.kernels.launch import launch
from softkv.kernels.problem import SIZES, Problem, per_item, tokens
from softkv.kernels.softmax import LOG2E, LOWEST, attend, finish
from softkv.kernels.tiles import block_d

MOST_QUERIES = 16  # queries a row up to which the decode kernels are used
MOST_PARTS = 64  # parts of either kind
WAVES = 2  # programs a multiprocessor aimed at, of either kind


@triton.jit
def find_group(block, groups, count, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr):
    """(prefix, first token, tokens, first item) of a block: item tiles are dealt to groups in order; past the last one
    there are no tokens. BLOCK_A is a power of two, no less than the number of groups."""
    a = tl.arange(0, BLOCK_A)
    start = tl.load(groups.start + a, mask=a < count, other=0)
    size = tl.load(groups.start + a + 1, mask=a < count, other=0) - start
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
    q_tile, keys, mask_ptr, part, parts, out, lse, at, live, score_scale, softcap_scale, BOUNDED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the part-th share of a stretch of keys; items are stored `at` offsets (in head vectors)."""
    k, v, k_stride, v_stride, lower, upper, tiles = keys
    own = (k, v, k_stride, v_stride, lower, upper, share(tiles, part, parts, BLOCK_N))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc, m, l = attend(
        acc, m, l, q_tile, own, mask_ptr, score_scale, softcap_scale, BOUNDED,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip
    acc, total = finish(acc, m, l, None)
    store_items(out, at * HEAD_DIM, acc, live, HEAD_DIM, BLOCK_D)
    tl.store(lse + at, total, mask=live)


@triton.jit
def prefix_program(
    program, q, prefix_k, prefix_v, out_ptr, lse_ptr, prefix, groups, score_scale, softcap_scale, window,
    G, T, A, P, count, parts,
    PACKED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = program % parts
    g = (program // parts) % G
    block = program // (parts * G)
    if groups.start is not None:
        group_count = A if prefix.index is None else A + 1
        a, first, readers, item = find_group(block, groups, group_count, GROUP, BLOCK_M, BLOCK_A)
    else:
        a, first, readers, item = 0, 0, count, block * BLOCK_M
    item = item + tl.arange(0, BLOCK_M)
    live = item < readers * GROUP
    token = first + item // GROUP
    if groups.order is not None:
        token = tl.load(groups.order + token, mask=live, other=0)
    head = tl.cast(g, tl.int64) * GROUP + item % GROUP
    q_tile = load_some(
        item_pointers(q.ptr, token_offset(q, token, T, PACKED) + head * q.head, BLOCK_D), live, HEAD_DIM, BLOCK_D
    )
    length = prefix_length(a, prefix, A, P)
    keys = slots_seen(token, live, tl.minimum(a, A - 1), length, g, prefix_k, prefix_v, prefix, window, BLOCK_N)
    at = (tl.cast(part, tl.int64) * count + token) * (G * GROUP) + head
    attend_part(
        q_tile, keys, None, part, parts, out_ptr, lse_ptr, at, live, score_scale, softcap_scale, prefix.position is not None,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip


@triton.jit
def token_program(
    program, q, k, v, out_ptr, lse_ptr, rows, score_scale, softcap_scale, window,
    B, G, T, S, count, first_part, parts,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = program % parts
    row = (program // parts) % B
    g = (program // (parts * B)) % G
    block = program // (parts * B * G)
    q_start, t_count, k_start, n = row_extent(row, rows, T, S)
    live, token, head = items_of_block(block, q_start, t_count, g, GROUP, BLOCK_M)
    q_tile = load_some(item_pointers(q.ptr, item_offset(q, row, token, head), BLOCK_D), live, HEAD_DIM, BLOCK_D)
    mask = None
    if rows.mask is not None:
        mask = rows.mask + tl.cast(row, tl.int64) * S
    keys = tokens_seen(
        block, row, g, t_count, k_start, n, k, v, window, rows.mask is not None, CAUSAL, GROUP, BLOCK_M, BLOCK_N
    )  # fmt: skip
    flat = tl.cast(row, tl.int64) * T + token
    at = (tl.cast(first_part + part, tl.int64) * count + flat) * (G * GROUP) + head
    attend_part(
        q_tile, keys, mask, part, parts, out_ptr, lse_ptr, at, live, score_scale, softcap_scale, window is not None,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "count", "prefix_parts", "token_parts", "prefix_programs"])
def decode_kernel(
    q, k, v, prefix_k, prefix_v, out_ptr, lse_ptr, rows, prefix, groups, score_scale, softcap_scale, window,
    B, G, T, S, A, P, count, prefix_parts, token_parts, prefix_programs,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_PM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial outputs [parts, U, H, D] and lse [parts, U, H]: first the prefix's parts, then the tokens'."""
    program = tl.program_id(0)
    if prefix_k.ptr is not None:  # noqa: SIM102 (decided when compiling; the next, by each program)
        if program < prefix_programs:
            prefix_program(
                program, q, prefix_k, prefix_v, out_ptr, lse_ptr, prefix, groups, score_scale, softcap_scale, window,
                G, T, A, P, count, prefix_parts,
                PACKED, GROUP, HEAD_DIM, BLOCK_D, BLOCK_A, BLOCK_PM, BLOCK_N, BLOCK_E, PRECISION,
            )  # fmt: skip
    if program >= prefix_programs:
        token_program(
            program - prefix_programs, q, k, v, out_ptr, lse_ptr, rows, score_scale, softcap_scale, window,
            B, G, T, S, count, prefix_parts, token_parts,
            CAUSAL, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_E, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "count", "parts"])
def merge_kernel(
    part_out_ptr, part_lse_ptr, out, lse, sinks_ptr, T, H, count, parts,
    PACKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Merge the parts of M items, an item here being (flat token, head), by a running softmax over their lse."""
    item = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.cast(count, tl.int64) * H
    live = item < total
    head = item % H
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(parts):
        part_lse = tl.load(part_lse_ptr + item, mask=live, other=float("-inf")) * LOG2E
        m_new = tl.maximum(m, part_lse)
        a = tl.exp2(m - m_new)
        p = tl.exp2(part_lse - m_new)
        acc = acc * a[:, None] + p[:, None] * load_some(
            item_pointers(part_out_ptr, item * HEAD_DIM, BLOCK_D), live, HEAD_DIM, BLOCK_D
        )
        l = l * a + p
        m = m_new
        part_lse_ptr += total
        part_out_ptr += total * HEAD_DIM
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=live, other=0).to(tl.float32)
    acc, log_sum = finish(acc, m, l, sink)
    token = item // H
    store_items(out.ptr, token_offset(out, token, T, PACKED) + head * out.head, acc, live, HEAD_DIM, BLOCK_D)
    tl.store(lse.ptr + token_offset(lse, token, T, PACKED) + head * lse.head, log_sum, mask=live)


def parts_of(keys: int, programs: int, block: int, units: int) -> int:
    """How many parts the keys are cut in: enough programs to fill the device, no part without a tile."""
    return max(1, min(triton.cdiv(keys, block), triton.cdiv(WAVES * units, max(programs, 1)), MOST_PARTS))


def run_decode(problem: Problem) -> tuple[Tensor, Tensor]:
    """As `run_forward`, for rows of few queries."""
    p, tile, merge = problem, problem.tile("decode"), problem.tile("merge")
    units = p.target.units
    prefix_tile = problem.tile("decode_prefix")
    items = p.tokens * p.group
    block_a, groups, prefix_parts, prefix_programs = 1, Groups(None, None, None), 0, 0
    if p.prefix_k is not None:
        groups = p.groups()
        blocks = triton.cdiv(items, prefix_tile.own)
        if groups.start is not None:  # each group may end in a part-filled tile
            blocks = min(items, blocks + groups.start.numel() - 1)
            block_a = triton.next_power_of_2(groups.start.numel())
        prefix_parts = parts_of(p.P, blocks * p.G, tile.step, units)
        prefix_programs = blocks * p.G * prefix_parts
    blocks = triton.cdiv(p.T_max * p.group, tile.own)
    token_parts = parts_of(p.S_max, blocks * p.G * p.B, tile.step, units)
    parts = prefix_parts + token_parts
    part_out = p.q.new_empty((parts, p.tokens, p.H, p.D), dtype=torch.float32)
    part_lse = p.q.new_empty((parts, p.tokens, p.H), dtype=torch.float32)
    out = torch.empty_like(p.q)
    lse = p.q.new_empty((p.H, p.tokens) if p.packed else (p.B, p.H, p.T), dtype=torch.float32)
    arguments = p.arguments()
    del arguments["SHARED"]
    launch(
        decode_kernel, prefix_programs + blocks * p.G * p.B * token_parts, tile, **arguments,
        out_ptr=part_out, lse_ptr=part_lse, groups=groups, count=p.tokens, prefix_parts=prefix_parts,
        token_parts=token_parts, prefix_programs=prefix_programs, PACKED=p.packed, BLOCK_A=block_a,
        BLOCK_PM=prefix_tile.own, BLOCK_M=tile.own, BLOCK_N=tile.step, BLOCK_E=tile.edge,
    )  # fmt: skip
    launch(
        merge_kernel, triton.cdiv(p.tokens * p.H, merge.own), merge, part_out_ptr=part_out, part_lse_ptr=part_lse,
        out=tokens(out), lse=per_item(lse), sinks_ptr=p.sinks, T=p.T, H=p.H, count=p.tokens, parts=parts,
        PACKED=p.packed, HEAD_DIM=p.D, BLOCK_D=block_d(p.D), BLOCK_M=merge.own,
    )  # fmt: skip
    return out, lse
