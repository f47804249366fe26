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
from softkv.kernels.geometry import item_pointers, load_some, prefix_of_row, row_extent, span, store_items
from softkv.kernels.launch import launch
from softkv.kernels.problem import Problem, per_item, tokens
from softkv.kernels.softmax import LOWEST, attend, finish
from torch import Tensor

SIZES = ["B", "G", "T", "S", "A", "P", "window"]  # values that must not make a new binary


@triton.jit
def prefix_tiles(lower, live, length, BLOCK_N: tl.constexpr):
    """Tiles of a prefix's slots that items may see; `lower` [M] where a window covers the prefix, else None."""
    if lower is not None:
        lower_min = tl.min(tl.where(live, lower, length), 0)
        lower_max = tl.max(tl.where(live, lower, 0), 0)
        return span(tl.minimum(lower_min, length), lower_max, length - 1, length - 1, False, BLOCK_N)
    else:
        return span(0, 0, length - 1, length - 1, False, BLOCK_N)


@triton.jit
def token_tiles(first, last, t, n, T, window, CAUSAL: tl.constexpr, MASK_ALL: tl.constexpr, BLOCK_N: tl.constexpr):
    """(upper, tiles) of keys that query tokens `t`, from `first` to `last`, may see in a row of n keys."""
    if CAUSAL:
        upper = n - T + t
        upper_min = n - T + first
        upper_max = n - T + last
    else:
        upper = t * 0 + (n - 1)
        upper_min = n - 1
        upper_max = n - 1
    if window is not None:
        lower_min = tl.maximum(upper_min - window + 1, 0)
        lower_max = tl.maximum(upper_max - window + 1, 0)
        return upper, span(lower_min, lower_max, upper_min, upper_max, MASK_ALL, BLOCK_N)
    else:
        return upper, span(0, 0, upper_min, upper_max, MASK_ALL, BLOCK_N)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, prefix_k, prefix_v, out, lse, rows, prefix, sinks_ptr, score_scale, softcap_scale, window,
    B, G, T, S, A, P,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program % B
    g = (program // B) % G
    block = tl.num_programs(0) // (B * G) - 1 - program // (B * G)

    q_start, t_count, k_start, n = row_extent(row, rows, T, S)
    if block * BLOCK_M >= t_count * GROUP:
        return

    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = item < t_count * GROUP
    t = item // GROUP
    g64 = tl.cast(g, tl.int64)
    head = g64 * GROUP + item % GROUP
    token = tl.cast(q_start, tl.int64) + t
    row64 = tl.cast(row, tl.int64)
    q_tile = load_some(
        item_pointers(q.ptr, row64 * q.row + token * q.item + head * q.head, BLOCK_D), live, HEAD_DIM, BLOCK_D
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)

    if prefix_k.ptr is not None:
        a, length = prefix_of_row(row, prefix, A, P, SHARED)
        lower = None
        if prefix.position is not None:
            position = tl.load(prefix.position + row64 * T + token, mask=live, other=0)
            lower = tl.maximum(position - window + 1 + length, 0)
        tiles = prefix_tiles(lower, live, length, BLOCK_N)
        a64 = tl.cast(a, tl.int64)
        acc, m, l = attend(
            acc, m, l, q_tile,
            prefix_k.ptr + a64 * prefix_k.row + g64 * prefix_k.head, prefix_v.ptr + a64 * prefix_v.row + g64 * prefix_v.head,
            prefix_k.item, prefix_v.item, None, lower, t * 0 + (length - 1), tiles, score_scale, softcap_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
        )  # fmt: skip

    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, t_count - 1)
    upper, tiles = token_tiles(
        block * BLOCK_M // GROUP, last, t, n, t_count, window, CAUSAL, rows.mask is not None, BLOCK_N
    )
    lower = None
    if window is not None:
        lower = upper - window + 1
    first_key = tl.cast(k_start, tl.int64)
    mask_ptr = None
    if rows.mask is not None:
        mask_ptr = rows.mask + row64 * S
    acc, m, l = attend(
        acc, m, l, q_tile,
        k.ptr + row64 * k.row + first_key * k.item + g64 * k.head, v.ptr + row64 * v.row + first_key * v.item + g64 * v.head,
        k.item, v.item, mask_ptr, lower, upper, tiles, score_scale, softcap_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_E, PRECISION,
    )  # fmt: skip

    sink = None
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=live, other=0).to(tl.float32)
    acc, total = finish(acc, m, l, score_scale, sink)
    store_items(out.ptr, row64 * out.row + token * out.item + head * out.head, acc, live, HEAD_DIM, BLOCK_D)
    tl.store(lse.ptr + row64 * lse.row + token * lse.item + head * lse.head, total, mask=live)


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
