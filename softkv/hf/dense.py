"""Attention with a model-specific mask or position bias: T×S scores, as in eager attention. The prefix remains a
separate operand, unless its slots have position biases too."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from softkv.ops.api import prefix_attention


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    prefix: dict[str, Any],
    *,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str | None,
) -> Tensor:
    """Attention to the tokens allowed by a mask, and to every slot of the prefix.

    Args:
        query, key, value: `[B, H, T, D]`, `[B, G, S, D]`, `[B, G, S, Dv]`.
        allowed: `[B or 1, H or 1, T or 1, S]`, bool, or additive on the scores.
        bias: added to the scores, `[B or 1, H or 1, T, S]`, or None.
        prefix: the prefix keywords of `softkv.prefix_attention`, or none.
        scale, softcap, sinks, backend: as in `softkv.prefix_attention`.

    Returns:
        `[B, H, T, Dv]`
    """
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, -1))  # [B, G, H/G, T, D]
    scores = (grouped @ key.unsqueeze(2).mT).flatten(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (bias, None if allowed.dtype == torch.bool else allowed):
        if added is not None:
            scores = scores + added
    if allowed.dtype == torch.bool:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    lse = scores.logsumexp(-1)  # [B, H, T]
    weights = (scores - lse[..., None]).exp().to(value.dtype)
    out = (weights.unflatten(1, (groups, -1)) @ value.unsqueeze(2)).flatten(1, 2)
    if not prefix:
        if sinks is not None:
            out = _weighted(out, lse, torch.logaddexp(lse, sinks.float()[:, None]))
        return out
    no_tokens = key[:, :, :0], value[:, :, :0]
    slots, slots_lse = cast(
        tuple[Tensor, Tensor],
        prefix_attention(
            query, *no_tokens, **prefix, scale=scale, is_causal=False, softcap=softcap, sinks=sinks, return_lse=True,
            backend=backend,
        ),
    )  # fmt: skip
    total = torch.logaddexp(lse, slots_lse)
    return _weighted(out, lse, total) + _weighted(slots, slots_lse, total)


def _weighted(out: Tensor, lse: Tensor, total: Tensor) -> Tensor:
    return out * (lse - total).exp()[..., None].to(out.dtype)


def in_front(
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    prefix: dict[str, Any],
    *,
    of_slots: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys, values, the mask and biases, with the slots of a prefix as tokens in front.

    Args:
        key, value, allowed, bias: as of `masked_attention`.
        prefix: the prefix keywords.
        of_slots: the biases of the slots, `[1, H, T, P]`, if tokens have biases.
        seen: the slots that each query sees, `[B or 1, T, P]`; None: all slots in use.
    """
    B, T = len(key), allowed.shape[2] if seen is None else seen.shape[1]
    k, v, index, lengths = (prefix[f"prefix_{name}"] for name in ("k", "v", "index", "lengths"))
    slots = torch.ones(len(k), 1, 1, k.shape[2], dtype=torch.bool, device=key.device)
    if lengths is not None:
        slots = slots & (torch.arange(k.shape[2], device=key.device) < lengths[:, None, None, None])
    if index is not None:
        k, v, slots = (x[index.clamp(min=0)] for x in (k, v, slots))
        slots = slots & (index >= 0)[:, None, None, None]
    if seen is not None:
        slots = slots & seen[:, None]
    if allowed.dtype != torch.bool:
        slots = torch.zeros_like(slots, dtype=allowed.dtype).masked_fill(~slots, torch.finfo(allowed.dtype).min)
    rows = max(len(slots), len(allowed))
    slots, allowed = (x.expand(rows, allowed.shape[1], T, -1) for x in (slots, allowed))
    if bias is not None:
        assert of_slots is not None
        bias = torch.cat([of_slots.to(bias.dtype).expand(len(bias), -1, -1, -1), bias], 3)
    return (
        torch.cat([k.expand(B, -1, -1, -1), key], 2),
        torch.cat([v.expand(B, -1, -1, -1), value], 2),
        torch.cat([slots, allowed], 3),
        bias,
    )
