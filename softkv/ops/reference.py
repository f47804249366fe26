"""The reference: attention over concatenated keys. Slow, short, any floating dtype, differentiable by autograd.

With the prefix in front of a row's keys, and scores s = softcap(scale · q kᵀ) where a key is visible, −∞ elsewhere:

    lse = log(Σ exp(s) + exp(sink)),   out = exp(s − lse) v

More scores than `_MOST_SCORES` are computed in slices, and recomputed in the backward, so that any shape fits in a few
GiB.

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P prefix slots, A prefixes, D head dim of
queries and keys, Dv of values.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_MOST_SCORES = 2**25  # at once: 128 MiB in float32


def forward(**call: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of a dense or packed `Call`, as from an engine."""
    starts_q, starts_k = call.pop("cu_seqlens_q"), call.pop("cu_seqlens_k")
    del call["max_seqlen_q"], call["max_seqlen_k"]
    if starts_q is None or starts_k is None:
        return reference_attention(**call)
    return _packed_rows(starts_q.tolist(), starts_k.tolist(), **call)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    chunk: int | None = None,
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, Dv], lse [B, H, T]); arguments as in `softkv.prefix_attention`, without validation."""
    B, H, T, D = q.shape
    S = k.shape[2]
    if prefix_k is None or prefix_v is None:
        prefix_k, prefix_v = (x.new_zeros(1, x.shape[1], 0, x.shape[3]) for x in (k, v))
    A, P = prefix_k.shape[0], prefix_k.shape[2]
    index = torch.arange(B, device=q.device) % A if prefix_index is None else prefix_index.long()
    lengths = torch.full((A,), P, device=q.device) if prefix_lengths is None else prefix_lengths.long()
    has_prefix = (index >= 0) & (index < A)
    if A == 0:  # an empty bank, from which no row reads
        prefix_k, prefix_v, lengths = (
            torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (prefix_k, prefix_v, lengths)
        )
    prefix_of = index.clamp(0, max(A - 1, 0))
    slots = torch.where(has_prefix, lengths[prefix_of], 0)
    n = torch.full((B,), S, device=q.device) if key_lengths is None else key_lengths.long()
    exists = torch.arange(S, device=q.device) < n[:, None]  # [B, S]
    if key_mask is not None:
        exists = exists & key_mask
    query = n[:, None] - T + torch.arange(T, device=q.device)  # [B, T], key positions
    visible = partial(
        visible_keys, P=P, is_causal=is_causal, chunk=chunk, window=window, window_covers_prefix=window_covers_prefix
    )
    attend = partial(_attend, visible, scale=D**-0.5 if scale is None else scale, softcap=softcap, sinks=sinks)

    if B * H * T * (P + S) <= _MOST_SCORES:
        return attend(query, exists, slots, q, k, v, prefix_k[prefix_of], prefix_v[prefix_of])
    most_queries = max(1, _MOST_SCORES // (H * (P + S)))
    rows = []
    for b in range(B):
        row, a = slice(b, b + 1), prefix_of[b : b + 1]
        of_row = k[row], v[row], prefix_k[a], prefix_v[a]
        parts = [
            checkpoint(attend, at, exists[row], slots[row], part, *of_row, use_reentrant=False)
            for at, part in zip(query[row].split(most_queries, 1), q[row].split(most_queries, 2), strict=True)
        ]
        rows.append([torch.cat(x, 2) for x in zip(*parts, strict=True)])
    out, lse = (torch.cat(x) for x in zip(*rows, strict=True))
    return out, lse


def visible_keys(
    query: Tensor,
    exists: Tensor,
    slots: Tensor,
    *,
    P: int,
    is_causal: bool,
    chunk: int | None,
    window: int | None,
    window_covers_prefix: bool,
) -> Tensor:
    """Bool [B, T, P + S]: the keys that each query sees. `query` [B, T] are the key positions of queries, `exists` [B,
    S] the keys that are not hidden, `slots` [B] the length of each row's prefix.

    Prefix slots are placed just before the row's first existing key, so padding never moves them.
    """
    B, T = query.shape
    S = exists.shape[1]
    query = query[:, :, None]
    position, slot = torch.arange(S, device=query.device), torch.arange(P, device=query.device)
    tokens = exists[:, None, :].expand(B, T, S)
    prefix = (slot < slots[:, None])[:, None, :].expand(B, T, P)
    if is_causal:
        tokens = tokens & (position <= query)
    first = exists.int().argmax(1) if S and window_covers_prefix else torch.zeros_like(slots)
    front = (first - slots)[:, None, None] if window_covers_prefix else 0  # where slot 0 stands, or key 0
    if chunk is not None:
        begin = (query - front).div(chunk, rounding_mode="floor") * chunk + front
        tokens = tokens & (position >= begin)
        if window_covers_prefix:
            prefix = prefix & (front + slot >= begin)
    if window is not None:
        tokens = tokens & (position > query - window)
        if window_covers_prefix:
            prefix = prefix & (front + slot > query - window)
    return torch.cat([prefix, tokens], dim=2)


def _attend(
    visible_of: partial[Tensor],
    query: Tensor,
    exists: Tensor,
    slots: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D] with prefixes [B, G, P, D], one per row."""
    R = q.shape[1] // k.shape[1]
    visible = visible_of(query, exists, slots)
    unseen = ~visible.any(1)[:, None, :, None]  # keys that no query sees may contain NaN
    keys = torch.cat([prefix_k, k], dim=2).masked_fill(unseen, 0).repeat_interleave(R, 1)
    values = torch.cat([prefix_v, v], dim=2).masked_fill(unseen, 0).repeat_interleave(R, 1)

    scores = ((q @ keys.transpose(-1, -2)) * scale).to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    # A query that sees nothing sums only −∞: keep it out of the graph, or its gradient is NaN.
    top = logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    top = top.masked_fill(top == float("-inf"), 0)
    total = (logits - top).exp().sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    out = ((scores - top).exp() / total).to(q.dtype) @ values
    lse = (total.log() + top).masked_fill(blind, float("-inf")).squeeze(-1)
    return out, lse


def _packed_rows(starts_q: list[int], starts_k: list[int], **call: Any) -> tuple[Tensor, Tensor]:
    """(out [N, H, Dv], lse [H, N]), one packed row at a time."""
    q, k, v, index, prefix_k = (call.pop(name) for name in ("q", "k", "v", "prefix_index", "prefix_k"))
    if prefix_k is not None and index is None:
        index = torch.arange(len(starts_q) - 1, device=q.device) % prefix_k.shape[0]
    outs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    lses = [q.new_zeros(q.shape[1], 0, dtype=torch.promote_types(q.dtype, torch.float32))]
    for row in range(len(starts_q) - 1):
        here, keys = slice(starts_q[row], starts_q[row + 1]), slice(starts_k[row], starts_k[row + 1])
        out, lse = reference_attention(
            q[here].transpose(0, 1)[None], k[keys].transpose(0, 1)[None], v[keys].transpose(0, 1)[None],
            prefix_k=prefix_k, prefix_index=None if index is None else index[row : row + 1], **call,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)
