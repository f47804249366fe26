"""Chunked attention (Llama 4) as a mask matrix, for rows with hidden keys or a cache that has dropped keys."""

from __future__ import annotations

import torch
from torch import Tensor

from softkv.hf.context import SoftContext
from softkv.hf.masks import Keys


def counted_slots(context: SoftContext, rows: int) -> int | Tensor:
    """The number of slots that chunks count: one for all rows, or `[rows]`. Slots of a text are counted; learned ones
    are visible from every chunk."""
    covers = context.window_covers
    if context.layers is None or covers is False:
        return 0
    slots = context.slots_of(rows)
    if not isinstance(covers, Tensor):
        return slots
    index = context.index_of(rows)
    assert index is not None
    covered = (index >= 0) & covers.to(index.device)[index.clamp(min=0)]
    return torch.where(covered, torch.as_tensor(slots, device=index.device), 0)


def chunked(
    keys: Keys, chunk: int, counted: int | Tensor, queries: int, key: Tensor, slots: int
) -> tuple[Tensor, Tensor]:
    """The keys, bool `[B, 1, T, S]`, and the slots, bool `[B, T, P]`, that each of T queries sees.

    Args:
        keys: the keys according to a mask.
        chunk: the size of a chunk.
        counted: the number of slots that chunks count, from `counted_slots`.
        queries: T.
        key: `[B, G, S, D]`.
        slots: P.
    """
    B, S, device = len(key), key.shape[2], key.device
    before = counted[:, None].to(device) if isinstance(counted, Tensor) else counted
    of_key = (keys.positions(B, S, device) + before).div(chunk, rounding_mode="floor")  # [B, S]
    end = torch.full((B,), S, device=device) if keys.lengths is None else keys.lengths.long()
    query = (end[:, None] - queries + torch.arange(queries, device=device)).clamp(min=0)  # [B, T]
    of_query = of_key.gather(1, query)[:, :, None]
    allowed = keys.matrix(True, None, queries, key) & (of_key[:, None] == of_query)[:, None]
    seen = torch.arange(slots, device=device).div(chunk, rounding_mode="floor") == of_query
    counts = torch.as_tensor(counted, device=device).expand(B) > 0
    return allowed, seen | ~counts[:, None, None]
