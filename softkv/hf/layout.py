"""The position of each row and prompt end in a batch, and the insertion of soft tokens.

A padded batch `[B, T]` is treated as B concatenated rows of T tokens, a packed one as R rows of different lengths, so
the same arithmetic on flat token indices serves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from softkv.hf.context import PackedRows, RowPrompts
from softkv.hf.packing import packed_rows

IGNORED = -100  # the label of a token that is not an answer


@dataclass(frozen=True)
class RowLayout:
    """The rows of a batch as ranges of flat token indices.

    Attributes:
        bounds: `[R + 1]`, row r consists of flat tokens `bounds[r]` to `bounds[r + 1]`, including padding.
        first, last: `[R]`, flat indices of the first real token and one past the last.
        shape: (B, T) of the batch.
        packed: whether the rows are packed.
    """

    bounds: Tensor
    first: Tensor
    last: Tensor
    shape: tuple[int, int]
    packed: bool

    @classmethod
    def of(
        cls, shape: tuple[int, int], attention_mask: Tensor | None, rows: PackedRows | None, device: torch.device
    ) -> RowLayout:
        if rows is not None:
            bounds = rows.cu_seqlens.long()
            return cls(bounds, bounds[:-1], bounds[1:], shape, packed=True)
        if attention_mask is None:
            if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
                return _unpadded(shape, device)
            return _kept(shape, device)
        bounds = torch.arange(shape[0] + 1, device=device) * shape[1]
        real = attention_mask.to(torch.int8)
        first = bounds[:-1] + real.argmax(1)
        last = bounds[1:] - real.flip(1).argmax(1)
        return cls(bounds, first, torch.where(real.any(1), last, first), shape, packed=False)

    @property
    def rows(self) -> int:
        """R"""
        return len(self.first)

    @property
    def row_of_token(self) -> Tensor:
        """`[B·T]`: the row of each flat token."""
        line = torch.arange(len(self.first), device=self.first.device)
        return line.repeat_interleave(self.bounds.diff(), output_size=self.shape[0] * self.shape[1])

    def prompt_ends(self, labels: Tensor | None, prompt_lengths: Tensor | None) -> Tensor:
        """`[R]`: the flat index one past each row's prompt: its first label, else `prompt_lengths` tokens after its
        first, else its end."""
        if labels is not None:
            answers = torch.where(labels.flatten() != IGNORED, 1, 0)
            number = torch.arange(answers.numel(), device=answers.device)
            candidates = torch.where(answers.bool(), number, answers.numel())
            start = torch.full_like(self.last, answers.numel()).scatter_reduce(0, self.row_of_token, candidates, "amin")
            return torch.minimum(start, self.last)
        if prompt_lengths is not None:
            return torch.minimum(self.first + prompt_lengths, self.last)
        return self.last

    def prompts(self, ends: Tensor) -> RowPrompts:
        """The prompt tokens of each row, as an index into the flat batch."""
        lengths = ends - self.first
        offsets = torch.arange(int(lengths.max()) if len(lengths) else 0, device=ends.device)
        index = (self.first[:, None] + offsets).clamp(max=max(self.shape[0] * self.shape[1] - 1, 0))
        return RowPrompts(index, lengths)


def _unpadded(shape: tuple[int, int], device: torch.device) -> RowLayout:
    bounds = torch.arange(shape[0] + 1, device=device) * shape[1]
    return RowLayout(bounds, bounds[:-1], bounds[1:], shape, packed=False)


@lru_cache(maxsize=16)
def _kept(shape: tuple[int, int], device: torch.device) -> RowLayout:
    with torch.inference_mode(False):
        return _unpadded(shape, device)


@dataclass(frozen=True)
class Insertion:
    """Insertion of a block of soft tokens into every row of a batch, and its inverse. In a padded batch, rows with
    shorter blocks are padded on the left.

    Attributes:
        source: `[B, T']`, the flat token of each new column, `B·T + j` for soft token j, -1 for padding.
        logits_at: `[B, T]`, the new column with the logits of each original column: its own, except for the column
            before the block, which gets the block's last.
        token_at: `[B, T]`, the new column of each original token.
        before: `[R]`, the flat token before each row's block; the first token of a row without a prompt.
        empty: `[R]`, whether the row has no prompt.
        first: `[R]`, the first soft token of each row's block.
        layout: the rows of the new batch.
    """

    source: Tensor
    logits_at: Tensor
    token_at: Tensor
    before: Tensor
    empty: Tensor
    first: Tensor
    layout: RowLayout

    @classmethod
    def into(cls, layout: RowLayout, split: Tensor, first: list[int], block: list[int]) -> Insertion:
        """Insert `block[r]` soft tokens, starting with number `first[r]`, before flat token `split[r]` of each row
        r."""
        B, T = layout.shape
        N, R, device = B * T, len(layout.first), split.device
        K = max(block)
        k, begin = (torch.tensor(x, device=device) for x in (block, first))  # [R]
        number, order = torch.arange(N, device=device), torch.arange(R, device=device)
        line = layout.row_of_token
        ends = k.cumsum(0)
        shift = ends - k if layout.packed else K * (order + 1) - k  # of each row's first token
        moved = number + shift[line] + k[line] * (number >= split[line])  # flat, in the new batch
        source = torch.full((N + (sum(block) if layout.packed else R * K),), -1, device=device)
        source[moved] = number
        soft = torch.arange(sum(block), device=device)
        row = order.repeat_interleave(k, output_size=len(soft))
        soft = soft - (ends - k)[row]  # within its block
        source[(split + shift)[row] + soft] = N + begin[row] + soft
        # The column before the block carries the block's last logits.
        logits_at = moved + torch.where((number == split[line] - 1) & (number >= layout.first[line]), k[line], 0)
        shape = (1, len(source)) if layout.packed else (B, T + K)
        if not layout.packed:
            moved, logits_at = moved - (T + K) * line, logits_at - (T + K) * line
        bounds = layout.bounds + (F.pad(ends, (1, 0)) if layout.packed else K * torch.arange(R + 1, device=device))
        new = RowLayout(bounds, layout.first + shift, layout.last + shift + k, shape, layout.packed)
        empty = split == layout.first
        before = torch.where(empty, split, split - 1).clamp(max=N - 1)
        return cls(source.view(shape), logits_at.view(B, T), moved.view(B, T), before, empty, begin, new)

    def embeddings(self, embeds: Tensor, soft: Tensor) -> Tensor:
        """`[B, T', C]` from the batch's embeddings `[B, T, C]` and the soft tokens `[k, C]`."""
        return torch.cat([embeds.flatten(0, 1), soft.to(embeds.dtype)])[self.source]

    def attention_mask(self, mask: Tensor) -> Tensor:
        """The padding mask `[B, T']` from that of the original batch: soft tokens are real."""
        kept = mask.flatten()[self.source.clamp(0, mask.numel() - 1)]
        return kept.masked_fill(self.source >= mask.numel(), 1).masked_fill(self.source < 0, 0)

    def positions(self, position_ids: Tensor) -> Tensor:
        """Position ids `[B, T']` of a padded batch from the original ones: the block follows its prompt, and the answer
        follows the block."""
        flat = position_ids.flatten()
        N = len(flat)
        soft = self.source >= N
        start = flat[self.before] + torch.where(self.empty, 0, 1) - self.first
        moved = flat[self.source.clamp(0, N - 1)] + soft.cumsum(1)
        return torch.where(soft, start[:, None] + self.source - N, moved)


def rows_of(
    shape: tuple[int, int],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    longest: int | None,
) -> PackedRows | None:
    """The packed rows of a batch, from cumulative lengths or from position ids that restart."""
    if shape[0] != 1:
        return None
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32)
        return PackedRows(cu_seqlens, int(cu_seqlens.diff().max()) if longest is None else longest)
    return packed_rows(position_ids) if attention_mask is None else None


def with_prompt_lengths(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `prompt_lengths` `[R]`: the number of tokens of each row before its first label, unless given.

    Nothing predicts a row's first token, so its label is dropped, in padded and packed batches alike.
    """
    tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    shape, mask = (tokens.shape[0], tokens.shape[1]), batch.get("attention_mask")
    rows = rows_of(shape, mask, batch.get("position_ids"), batch.get("cu_seq_lens_q"), batch.get("max_length_q"))
    layout = RowLayout.of(shape, mask, rows, tokens.device)
    labels = batch["labels"].flatten().index_fill(0, layout.first[layout.first < layout.last], IGNORED).view(shape)
    lengths = batch.get("prompt_lengths")
    if lengths is None:
        lengths = layout.prompt_ends(labels, None) - layout.first
    return batch | {"labels": labels, "prompt_lengths": lengths}


def token_positions(
    attention_mask: Tensor | None, shape: tuple[int, int], past: int | Tensor, device: torch.device
) -> Tensor:
    """Positions `[B or 1, T]` of the last T tokens, relative to each row's first real token."""
    if attention_mask is not None and attention_mask.dim() == 2:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        end = past + shape[1]
        if isinstance(end, int) and end < positions.shape[1]:  # of a whole static buffer
            positions = positions[:, :end]
        return positions[:, -shape[1] :]
    return (torch.arange(shape[1], device=device) + past)[None]


def packed_positions(rows: PackedRows, tokens: int) -> Tensor:
    """Positions `[1, N]` that restart with each packed row."""
    starts = rows.cu_seqlens[:-1].long()
    lengths = rows.cu_seqlens.diff().long()
    return (torch.arange(tokens, device=starts.device) - torch.repeat_interleave(starts, lengths, output_size=tokens))[
        None
    ]


def scattered(attention_mask: Tensor) -> bool:
    """Whether any row has padding after a real token."""
    return bool((attention_mask[:, :-1].bool() & ~attention_mask[:, 1:].bool()).any())


def padded_in_front(attention_mask: Tensor) -> bool:
    """Whether any row has padding before a real token."""
    return bool((~attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()).any())


def right_order(attention_mask: Tensor) -> Tensor:
    """`[B, T]`: an order of each row's columns that puts all padding on the right."""
    return (~attention_mask.bool()).int().argsort(dim=1, stable=True)


def left_order(attention_mask: Tensor) -> Tensor:
    """`[B, T]`: an order of each row's columns that puts all padding on the left."""
    return attention_mask.bool().int().argsort(dim=1, stable=True)


def left_padded(tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """The same rows (ids `[B, T]` or embeddings `[B, T, C]`) with all padding on the left."""
    return in_order(tokens, left_order(attention_mask))


def in_order(tokens: Tensor, order: Tensor) -> Tensor:
    """Reorder the columns of ids `[B, T]`, embeddings `[B, T, C]` or positions `[1, T]` by `order` `[B, T]`."""
    tokens = tokens.expand(len(order), *tokens.shape[1:])
    return tokens.gather(1, order if tokens.dim() == 2 else order[:, :, None].expand_as(tokens))


def keep_in(columns: Tensor, width: int, logits_to_keep: int | Tensor) -> Tensor:
    """`logits_to_keep` of the original batch, mapped to a batch of `width` columns in which its columns are at
    `columns` `[B, T]`."""
    if isinstance(logits_to_keep, int):
        return columns[:, -logits_to_keep:] if logits_to_keep else columns
    if logits_to_keep.dtype == torch.bool:
        new = torch.zeros(len(columns), width, dtype=torch.bool, device=columns.device)
        rows = torch.arange(len(new), device=new.device)[:, None].expand_as(columns)
        new[rows[logits_to_keep], columns[logits_to_keep]] = True
        return new
    if logits_to_keep.dim() == 1:
        return columns[:, logits_to_keep]
    return columns.gather(1, logits_to_keep)
