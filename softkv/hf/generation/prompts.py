"""The prompts that `generate` passes to the base, and their mapping to the given prompts.

The base generates from left-padded rows. Soft tokens of the prompt are ordinary columns, whose embeddings the pre-hook
of the decoder inserts. Logits processors and stopping criteria see the real tokens only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softkv.hf.generation.processors import ProcessorView, Streamer
from softkv.hf.layout import left_padded, scattered
from softkv.hf.prefixes import RowTokens
from softkv.hf.task_rows import TOKEN_TYPES


@dataclass
class Prompts:
    """The prompts of one `generate`.

    Attributes:
        given: the given ids `[B, T]` (soft tokens as padding), or None.
        columns: T.
        ids, embeds, mask: what the base generates from, `[B, T + k]`, left-padded.
        soft_at: `[B, T + k]`, the soft token in each column (-1: none), or None if there are none.
        view: what processors and criteria see instead of `ids`, or None for `ids` themselves.
        moved: whether `ids` differ from `given`.
        types: the given token types, for the columns of `ids`.
    """

    given: Tensor | None
    columns: int
    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor | None
    soft_at: Tensor | None
    view: ProcessorView | None
    moved: bool
    types: dict[str, Tensor]

    @classmethod
    def prepare(
        cls,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        *,
        soft: RowTokens | None,
        pad: int,
        past: int,
        placeholders: Collection[int] = (),
        options: dict[str, Any],
    ) -> Prompts:
        """The prompts of the base.

        Args:
            ids, embeds, mask: as given, `[B, T]`, `[B, T, C]` and `[B, T]`, with padding on either side.
            soft: the soft tokens at negative ids, and those to insert before or after every prompt.
            pad: the id in place of soft tokens in returned sequences.
            past: the number of tokens already in a cache; they stay in their columns.
            options: of `generate`, including token types.
            placeholders: ids that the base replaces by images or audio.
        """
        tokens = ids if ids is not None else embeds
        assert tokens is not None
        columns = tokens.shape[1]
        given = ids if ids is None else ids.masked_fill(ids < 0, pad)
        types = {name: options[name] for name in TOKEN_TYPES if options.get(name) is not None}
        soft_at = None
        if soft is not None and (soft.longest or (ids is not None and bool((ids < 0).any()))):
            front, behind = (soft.blocks(tokens.device, heads=heads) for heads in (True, False))
            if mask is None and bool((front < 0).any() or (behind < 0).any()):
                mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
            if mask is not None:
                mask = torch.cat([(front >= 0).to(mask.dtype), mask, (behind >= 0).to(mask.dtype)], 1)
            types = {
                name: torch.cat([x.new_zeros(front.shape), x, x.new_zeros(behind.shape)], 1)
                for name, x in types.items()
            }
            if ids is not None:
                soft_at = torch.cat([front, (-soft.in_table(ids) - 1).clamp(min=-1), behind], 1)
                # For an assistant model, soft tokens are replaced by a token that the row already contains.
                words = ids.masked_fill(torch.isin(ids, ids.new_tensor(sorted(placeholders))), -1)
                stand_in = words.amax(1, keepdim=True).clamp(min=0)
                inside = torch.where(ids < 0, stand_in, ids)
                ids = torch.cat([stand_in.expand(front.shape), inside, stand_in.expand(behind.shape)], 1)
            if embeds is not None:
                table = soft.table.to(embeds.dtype)
                embeds = torch.cat([table[front.clamp(min=0)], embeds, table[behind.clamp(min=0)]], 1)
        moving = mask is not None and not past and scattered(mask)
        if moving:
            assert mask is not None
            ids, embeds, soft_at = (x if x is None else left_padded(x, mask) for x in (ids, embeds, soft_at))
            types = {name: left_padded(x, mask) for name, x in types.items()}
            mask = left_padded(mask, mask)
        view = None if ids is None or soft_at is None else ProcessorView.of(ids, mask, soft_at, pad)
        return cls(given, columns, ids, embeds, mask, soft_at, view, moving or soft_at is not None, types)

    @property
    def inserted(self) -> int:
        """The number of columns added to `ids` or `embeds`."""
        prompt = self.ids if self.embeds is None else self.embeds
        assert prompt is not None
        return prompt.shape[1] - self.columns

    def mask_for(self, rows: int) -> Tensor | None:
        """`mask`, repeated for the rows that the base makes from the prompts."""
        return self.mask if self.mask is None else self.mask.repeat_interleave(rows // len(self.mask), 0)

    def with_given(self, output: Any) -> Any:
        """The output with the given ids at the start of its sequences."""
        if self.given is None or self.ids is None or not self.moved:
            return output
        sequences = output if isinstance(output, Tensor) else output.sequences
        front = self.given.repeat_interleave(len(sequences) // len(self.given), 0)
        sequences = torch.cat([front, sequences[:, self.ids.shape[1] :]], 1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def streamer(self, streamer: Any) -> Streamer:
        """The user's streamer, which sees the given ids as the prompt."""
        return Streamer(streamer, self.given if self.moved else None)


def lengthened(options: dict[str, Any], config: Any, k: int) -> dict[str, Any]:
    """The options of `generate` with total lengths increased by k columns."""
    longer = dict(options)
    for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = options.get(total, getattr(config, total))
        if k and length and options.get(new, getattr(config, new)) is None:
            longer[total] = length + k
    return longer


def pad_id(options: dict[str, Any], config: Any) -> int:
    """The padding id: the pad token, else the (first) end token, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        found = options.get(name, getattr(config, name))
        if found is not None:
            return int(found[0]) if isinstance(found, list) else int(found)
    return 0


def mask_of(ids: Tensor, options: dict[str, Any], config: Any) -> Tensor:
    """The padding mask that transformers infers from ids: pad tokens are padding unless they are also end tokens."""
    pad = options.get("pad_token_id", config.pad_token_id)
    eos = options.get("eos_token_id", config.eos_token_id)
    ends = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    return (ids != pad).long()
