"""Forward: attention of every query to its prefix, then to the tokens of its row, in one pass.

    out = (Σ_slots 2^(s − lse) v_slot + Σ_tokens 2^(s − lse) v_token),     lse = ln(Σ exp(s) + exp(sink))

A program owns M items (query tokens × the H/G heads of a group) of one row. It walks the prefix, which is read where it
lies (stride 0 over the batch when shared, picked by `prefix_index` in a bank), then the row's key tiles. Programs with the
last queries start first (they see most keys); neighbours share the kv-head, so prefix and keys are found in L2.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P slots, D head dim, GROUP = H/G.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from softkv.kernels.geometry import (
    block_of_program,
    item_offset,
    item_pointers,
    items_of_block,
    load_some,
    prefix_of_row,
    row_extent,
    store_items,
)
from softkv.kernels.keys import slots_seen, tokens_seen
from softkv.kernels.launch import launch
from softkv.kernels.problem import SIZES, Problem, per_item, tokens
from softkv.kernels.softmax import LOWEST, attend, finish


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, prefix_k, prefix_v, out, lse, rows, prefix, sinks_ptr, score_scale, softcap_scale, window,
    B, G, T, S, A, P,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, g, block = block_of_program(B, G)
    q_start, t_count, k_start, n = row_extent(row, rows, T, S)
    if block * BLOCK_M >= t_count * GROUP:
        return
    live, token, head = items_of_block(block, q_start, t_count, g, GROUP, BLOCK_M)
    q_tile = load_some(item_pointers(q.ptr, item_offset(q, row, token, head), BLOCK_D), live, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if prefix_k.ptr is not None:
        a, length = prefix_of_row(row, prefix, A, P, SHARED)
        flat = tl.cast(row, tl.int64) * T + token
        keys = slots_seen(flat, live, a, length, g, prefix_k, prefix_v, prefix, window, BLOCK_N)
        acc, m, l = attend(
            acc, m, l, q_tile, keys, None, score_scale, softcap_scale, prefix.position is not None,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
        )  # fmt: skip
    mask = None
    if rows.mask is not None:
        mask = rows.mask + tl.cast(row, tl.int64) * S
    keys = tokens_seen(
        block, row, g, t_count, k_start, n, k, v, window, rows.mask is not None, CAUSAL, GROUP, BLOCK_M, BLOCK_N
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, keys, mask, score_scale, softcap_scale, window is not None,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip
    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=live, other=0).to(tl.float32)
    acc, total = finish(acc, m, l, sink)
    store_items(out.ptr, item_offset(out, row, token, head), acc, live, HEAD_DIM, BLOCK_D)
    tl.store(lse.ptr + item_offset(lse, row, token, head), total, mask=live)


def run_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out like q, lse [B, H, T] or [H, N] fp32)."""
    p, tile = problem, problem.tile("forward")
    out = torch.empty_like(p.q)
    lse = p.q.new_empty((p.H, p.tokens) if p.packed else (p.B, p.H, p.T), dtype=torch.float32)
    blocks = triton.cdiv(p.T_max * p.group, tile.own)
    launch(
        forward_kernel, blocks * p.G * p.B, tile, **p.arguments(),
        out=tokens(out), lse=per_item(lse), sinks_ptr=p.sinks, BLOCK_M=tile.own, BLOCK_N=tile.step, BLOCK_E=tile.edge,
    )  # fmt: skip
    return out, lse
