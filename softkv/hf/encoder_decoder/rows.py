"""The rows of an encoder, with soft tokens inserted and all padding on the right, so that results don't depend on
padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softkv.hf.layout import Insertion, RowLayout, in_order, padded_in_front, right_order
from softkv.hf.prefixes import RowTokens
from softkv.hf.task_rows import TOKEN_TYPES

_ROWS = ("input_ids", "inputs_embeds", "attention_mask")

_ZERO_FOR_SOFT = (*TOKEN_TYPES, "global_attention_mask")  # inputs per token that are 0 for soft tokens


def encoder_rows(
    given: dict[str, Any], tokens: RowTokens | None, embed: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """The keywords of the encoder, with soft tokens inserted into its rows and all padding on the right.

    Args:
        given: the given keywords: `input_ids` `[B, S]` (negative: soft tokens) or `inputs_embeds` `[B, S, C]`;
            `attention_mask` `[B, S]`, padding anywhere, or None; others with one value per token, `[B or 1, S, ...]`,
            move with the tokens.
        tokens: the soft tokens of the rows, or None.
        embed: returns embeddings `[B, S, C]` of ids, given the table of soft tokens.

    Raises:
        ValueError: for an input per token that has no value for soft tokens.
    """
    ids, embeds, mask = (given.get(name) for name in _ROWS)
    read = ids if embeds is None else embeds
    assert read is not None
    B, S = read.shape[:2]
    beside = {name: x.expand(B, *x.shape[1:]) for name, x in given.items() if _is_per_token(name, x, (B, S))}
    if tokens is not None:
        if ids is not None:
            embeds, ids = embed(tokens.in_table(ids), tokens.table), None
        assert embeds is not None
        if tokens.longest:
            layout = RowLayout.of((B, S), mask, None, embeds.device)
            insertion = Insertion.into(layout, tokens.place(layout.first, layout.last), tokens.first, tokens.block)
            if mask is None and tokens.ragged:  # shorter blocks leave padding
                mask = torch.ones(B, S, dtype=torch.long, device=embeds.device)
            embeds = insertion.embeddings(embeds, tokens.table)
            mask = mask if mask is None else insertion.attention_mask(mask)
            beside = {name: _with_soft_tokens(name, x, insertion) for name, x in beside.items()}
    if mask is not None and padded_in_front(mask):
        order = right_order(mask)
        ids, embeds = (x if x is None else in_order(x, order) for x in (ids, embeds))
        mask, beside = in_order(mask, order), {name: in_order(x, order) for name, x in beside.items()}
    return given | beside | dict(zip(_ROWS, (ids, embeds, mask), strict=True))


def _is_per_token(name: str, x: Any, shape: tuple[int, int]) -> bool:
    """Whether an input has a value for each token: its type, its position, its bounding box."""
    if name in _ROWS or not isinstance(x, Tensor) or x.dim() not in (2, 3):
        return False
    return (name == "bbox" or not x.is_floating_point()) and x.shape[0] in (1, shape[0]) and x.shape[1] == shape[1]


def _with_soft_tokens(name: str, x: Tensor, insertion: Insertion) -> Tensor:
    """An input `[B, S]` per token, extended to `[B, T']` by values for soft tokens."""
    if name == "position_ids":
        return insertion.positions(x)
    if name not in _ZERO_FOR_SOFT:
        raise ValueError(
            f"{name} has a value for each token, but none for inserted soft tokens: expected PTuning, whose rows "
            "contain all soft tokens as ids, or a prefix"
        )
    return x.new_zeros(len(x), insertion.source.shape[1]).scatter(1, insertion.token_at, x)


def encoded_mask(mask: Tensor | None, tokens: RowTokens | None, shape: tuple[int, int]) -> Tensor | None:
    """The padding mask `[R, S']` of the encoder's output, from the mask of its given rows.

    Args:
        mask: `[R, S]`, padding anywhere, or None.
        tokens: the soft tokens inserted into the encoder's rows, or None; R is a multiple of these rows (beams).
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
