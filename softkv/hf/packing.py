"""Packed rows in the form of transformers' collators: cumulative lengths, or position ids that restart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.hf.context import PackedRows
from softkv.hf.key_state import KeyState
from softkv.hf.masks import is_constant


def rows_of_line(
    query: Tensor,
    key: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
    mask: Tensor | None,
) -> PackedRows | None:
    """The packed rows of a batch in the form of transformers' collators: cumulative lengths, or position ids that
    restart, which are read once per forward pass.

    Args:
        mask: passed to all blocks of the pass; the rows found by the first are stored on it for the others.
    """
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        return None
    if cu_seqlens is not None and longest is not None:
        return PackedRows(cu_seqlens.to(torch.int32), longest)
    if torch.compiler.is_compiling() or not isinstance(mask, KeyState) or is_constant(mask):
        return packed_rows(position_ids)
    if mask.rows is None or mask.rows[0] is not position_ids:
        mask.rows = position_ids, packed_rows(position_ids)
    return mask.rows[1]


def apart(query: Tensor, key: Tensor, position_ids: Tensor | None) -> Tensor | None:
    """bool `[1, 1, T, T]`: whether two tokens belong to the same packed row, for tracers, which can't read the number
    of rows."""
    T = query.shape[2]
    if position_ids is None or len(query) != 1 or key.shape[2] != T or position_ids.shape != (1, T) or T == 1:
        return None
    row = F.pad((position_ids[0].diff() != 1).cumsum(0), (1, 0))
    return (row[:, None] == row)[None, None]


def packed_rows(position_ids: Tensor | None) -> PackedRows | None:
    """The rows of `position_ids` `[1, N]` that restart; None if they don't, or a tracer can't tell."""
    if torch.compiler.is_compiling() or position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1:
        return None
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    if not len(starts):
        return None
    bounds = F.pad(starts, (1, 0))
    return PackedRows.from_lengths(F.pad(bounds, (0, 1), value=position_ids.shape[1]).diff())
