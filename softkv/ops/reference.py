"""The oracle: attention over really concatenated keys. Slow, short, any floating dtype, differentiable by autograd.

With the prefix in front of a row's keys, and scores s = softcap(scale · q kᵀ) where a key is visible, −∞ elsewhere:

    lse = log(Σ exp(s) + exp(sink)),   out = exp(s − lse) v

Axes: B rows, H query heads, G key/value heads, T query tokens, S key tokens, P prefix slots, A prefixes, D head dim.
"""

import torch
from torch import Tensor


def visible_keys(
    q: Tensor,
    k: Tensor,
    *,
    slots: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    is_causal: bool,
    window: int | None,
    window_covers_prefix: bool,
    P: int,
) -> Tensor:
    """Bool [B, T, P + S]: which key each query sees. `slots` [B] is the length of each row's own prefix.

    A prefix slot stands just before the row's first key that `key_mask` keeps, so padding never moves it.
    """
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    n = torch.full((B,), S, device=q.device) if key_lengths is None else key_lengths.long()
    position = torch.arange(S, device=q.device)
    exists = position < n[:, None]  # [B, S]
    if key_mask is not None:
        exists = exists & key_mask
    query = (n[:, None] - T + torch.arange(T, device=q.device))[:, :, None]  # [B, T, 1]
    tokens = exists[:, None, :].expand(B, T, S)
    slot = torch.arange(P, device=q.device)
    prefix = (slot < slots[:, None])[:, None, :].expand(B, T, P)
    if is_causal:
        tokens = tokens & (position <= query)
    if window is not None:
        tokens = tokens & (position > query - window)
        if window_covers_prefix:
            first = exists.int().argmax(1) if S else torch.zeros_like(n)
            prefix = prefix & ((first - slots)[:, None, None] + slot > query - window)
    return torch.cat([prefix, tokens], dim=2)


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
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, D], lse [B, H, T]); arguments as in `softkv.prefix_attention`, nothing is checked."""
    B, H, D = q.shape[0], q.shape[1], q.shape[3]
    if prefix_k is None or prefix_v is None:
        prefix_k = prefix_v = k.new_zeros(1, k.shape[1], 0, D)
    A, P = prefix_k.shape[0], prefix_k.shape[2]
    index = torch.arange(B, device=q.device) % A if prefix_index is None else prefix_index.long()
    lengths = torch.full((A,), P, device=q.device) if prefix_lengths is None else prefix_lengths.long()
    row = index.clamp(0, A - 1)
    slots = torch.where((index >= 0) & (index < A), lengths[row], 0)

    visible = visible_keys(
        q, k, slots=slots, key_mask=key_mask, key_lengths=key_lengths, is_causal=is_causal,
        window=window, window_covers_prefix=window_covers_prefix, P=P,
    )  # fmt: skip
    unseen = ~visible.any(1)[:, None, :, None]  # what no query sees may hold anything, NaN too
    keys = torch.cat([prefix_k[row], k], dim=2).masked_fill(unseen, 0).repeat_interleave(H // k.shape[1], 1)
    values = torch.cat([prefix_v[row], v], dim=2).masked_fill(unseen, 0).repeat_interleave(H // k.shape[1], 1)

    scores = (q @ keys.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
    # A query that sees nothing has only −∞ to add up: keep it off the graph, or its gradient is NaN.
    top = logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    top = top.masked_fill(top == float("-inf"), 0)
    total = (logits - top).exp().sum(-1, keepdim=True)
    blind = total == 0
    total = total.masked_fill(blind, 1)
    out = ((scores - top).exp() / total).to(q.dtype) @ values
    lse = (total.log() + top).masked_fill(blind, float("-inf")).squeeze(-1)
    return out, lse


def reference_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
    window_covers_prefix: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [N, H, D], lse [H, N]): each packed row on its own."""
    if prefix_k is not None and prefix_index is None:
        prefix_index = torch.arange(cu_seqlens_q.numel() - 1, device=q.device) % prefix_k.shape[0]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [q[:0]], [q.new_zeros(q.shape[1], 0, dtype=torch.promote_types(q.dtype, torch.float32))]
    for row in range(len(starts_q) - 1):
        here, keys = slice(starts_q[row], starts_q[row + 1]), slice(starts_k[row], starts_k[row + 1])
        out, lse = reference_attention(
            q[here].transpose(0, 1)[None], k[keys].transpose(0, 1)[None], v[keys].transpose(0, 1)[None],
            prefix_k, prefix_v, prefix_index=None if prefix_index is None else prefix_index[row : row + 1],
            prefix_lengths=prefix_lengths, scale=scale, is_causal=is_causal, window=window,
            window_covers_prefix=window_covers_prefix, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)
