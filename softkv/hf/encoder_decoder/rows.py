"""The rows of an encoder: soft tokens put in, all padding behind, so that a row is the same however it is padded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softkv.hf.layout import Insertion, RowLayout, in_order, padded_in_front, right_order
from softkv.hf.prefixes import RowTokens

Rows = tuple[Tensor | None, Tensor | None, Tensor | None]


def encoder_rows(
    ids: Tensor | None,
    embeds: Tensor | None,
    mask: Tensor | None,
    tokens: RowTokens | None,
    embed: Callable[[Tensor, Tensor], Tensor],
) -> Rows:
    """Ids, embeddings and mask that the encoder reads, one of the first two None.

    Args:
        ids, embeds: `[B, S]` (negative: soft tokens) or `[B, S, C]`.
        mask: `[B, S]`, padding anywhere, or None.
        tokens: the soft tokens that the rows hold, or None.
        embed: embeddings `[B, S, C]` of ids and the table of soft tokens.
    """
    if tokens is not None:
        if ids is not None:
            embeds, ids = embed(tokens.in_table(ids), tokens.table), None
        assert embeds is not None
        if tokens.longest:
            B, S, _ = embeds.shape
            layout = RowLayout.of((B, S), mask, None, embeds.device)
            insertion = Insertion.into(layout, tokens.place(layout.first, layout.last), tokens.first, tokens.block)
            if mask is None and tokens.ragged:  # shorter blocks leave padding
                mask = torch.ones(B, S, dtype=torch.long, device=embeds.device)
            embeds = insertion.embeddings(embeds, tokens.table)
            mask = mask if mask is None else insertion.attention_mask(mask)
    if mask is not None and padded_in_front(mask):
        order = right_order(mask)
        ids, embeds = (x if x is None else in_order(x, order) for x in (ids, embeds))
        mask = in_order(mask, order)
    return ids, embeds, mask


def encoded_mask(mask: Tensor | None, tokens: RowTokens | None, shape: tuple[int, int]) -> Tensor | None:
    """The padding mask `[R, S']` of an encoder's states, of that of the rows given.

    Args:
        mask: `[R, S]`, padding anywhere, or None.
        tokens: the soft tokens that rows of the encoder held, or None; R is a multiple of these rows (beams).
        shape: (R, S').
    """
    rows, width = shape
    inserted = 0 if tokens is None else tokens.longest
    if mask is None and (tokens is None or not tokens.ragged):
        return None
    like: Tensor | None = mask
    if mask is None:
        assert tokens is not None
        like = tokens.table
        real = torch.full((rows,), width - inserted, device=like.device)
    else:
        real = mask.long().sum(1)
    if tokens is not None:
        assert like is not None
        blocks = torch.tensor(tokens.block, device=like.device)
        real = real + blocks.repeat_interleave(rows // len(blocks), output_size=rows)
    seen = torch.arange(width, device=real.device) < real[:, None]
    return seen if mask is None else seen.to(mask.dtype)
