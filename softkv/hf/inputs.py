"""Converts a `SoftModel` batch to the base's inputs, and outputs back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from softkv.hf import checks
from softkv.hf.context import PackedRows
from softkv.hf.generation.cache_state import CacheState, buffer_length, check_contiguous, past_length
from softkv.hf.layout import (
    Insertion,
    RowLayout,
    in_order,
    keep_in,
    left_order,
    packed_positions,
    padded_in_front,
    right_order,
    rows_of,
    scattered,
)
from softkv.hf.prefixes import RowTokens
from softkv.hf.task_rows import Answers, MovedTokens, row_ids

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Inputs:
    """A batch being prepared for the base.

    Attributes:
        ids, embeds: `[B, T']` and `[B, T', C]`, one of them None.
        mask: the padding mask of the cache's columns and of these, or None.
        positions: without the prefix, or None if the base computes them.
        cache: transformers' cache, or None; it holds `past` tokens.
        layout: the layout of the rows.
        packed: the packed rows, or None.
        given: (B, T) of the original batch.
        answers: what the base's logits predict.
        columns: `[B, T]`, the current index of each original column; None while they have not moved.
        token_at: `[B, T]`, the current index of each original token; `columns` is that of its output.
        tokens: `[B, T]`, the ids of the embeddings, or None.
        source: of each column in the original batch (`Insertion.source`), after soft tokens were inserted.
        prompt_ends: `[R]`, the flat index one past each row's prompt, in the forward that reads prompts.
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    cache: Any
    past: int
    layout: RowLayout
    packed: PackedRows | None
    given: tuple[int, int]
    answers: Answers = "next token"
    columns: Tensor | None = None
    token_at: Tensor | None = None
    tokens: Tensor | None = None
    source: Tensor | None = None
    prompt_ends: Tensor | None = None

    @classmethod
    def read(
        cls,
        ids: Any,
        mask: Any,
        positions: Any,
        cache: Any,
        embeds: Any,
        options: dict[str, Any],
        answers: Answers,
    ) -> Inputs:
        """Validate a batch.

        Args:
            answers: what the base's logits predict.
            options: the remaining keywords, including those of packed rows.
        """
        tokens = checks.check_tokens(ids, embeds)
        checks.check_cache(cache)
        shape, past = (tokens.shape[0], tokens.shape[1]), past_length(cache)
        checks.check_positions(positions, shape)
        checks.check_packing(options, mask, shape, past)
        if past:
            layout = RowLayout.of(shape, None, None, tokens.device)
            return cls(ids, embeds, mask, positions, cache, past, layout, None, shape, answers)
        checks.check_mask(mask, shape[0], (shape[1], *buffer_length(cache, shape[1])))
        mask = mask if mask is None else mask[:, : shape[1]]
        packed = rows_of(shape, mask, positions, options.get("cu_seq_lens_q"), options.get("max_length_q"))
        if packed is not None and answers in ("row", "span", "choice"):
            raise ValueError("a head with one output per row expects padded rows (PaddingCollator), got packed ones")
        layout = RowLayout.of(shape, mask, packed, tokens.device)
        return cls(ids, embeds, mask, positions, cache, past, layout, packed, shape, answers)

    @property
    def restarts(self) -> Tensor | None:
        """`[1, T]`, position ids that may restart, as far as a tracer can tell; attention separates the rows."""
        unclear = torch.compiler.is_compiling() and self.packed is None and self.mask is None and self.cache is None
        return self.positions if unclear and self.given[0] == 1 else None

    @property
    def is_scattered(self) -> bool:
        """Whether any row has padding after a real token."""
        return not self.past and self.mask is not None and scattered(self.mask)

    @property
    def is_padded_in_front(self) -> bool:
        """Whether any row has padding before a real token."""
        return not self.past and self.mask is not None and padded_in_front(self.mask)

    def padded_left(self) -> Inputs:
        """The rows with all padding on the left, because windows of later tokens count the columns of the cache."""
        assert self.mask is not None
        return self._ordered(left_order(self.mask))

    def padded_right(self) -> Inputs:
        """The rows with all padding on the right, because heads of encoders read a row's first column."""
        assert self.mask is not None
        return self._ordered(right_order(self.mask))

    def _ordered(self, order: Tensor) -> Inputs:
        ids, embeds, mask, positions = (
            x if x is None else in_order(x, order) for x in (self.ids, self.embeds, self.mask, self.positions)
        )
        layout = RowLayout.of((order.shape[0], order.shape[1]), mask, None, order.device)
        at = order.argsort(1)
        columns, token_at = (at if x is None else at.gather(1, x) for x in (self.columns, self.token_at))
        return replace(
            self, ids=ids, embeds=embeds, mask=mask, positions=positions, layout=layout, columns=columns,
            token_at=token_at,
        )  # fmt: skip

    def with_prompt_ends(self, labels: Tensor | None, prompt_lengths: Tensor | None) -> Inputs:
        """The rows with the ends of their prompts, from labels or lengths."""
        if labels is not None and self.columns is not None:
            labels = in_order(labels, self.columns.argsort(1))
        return replace(self, prompt_ends=self.layout.prompt_ends(labels, prompt_lengths))

    def embedded(self, soft: RowTokens, embed: Callable[[Tensor, Tensor], Tensor]) -> Inputs:
        """Embeddings instead of ids, with soft tokens at negative ids."""
        if self.ids is None:
            return self
        ids = soft.in_table(self.ids, self.layout.row_of_token.view(self.ids.shape))
        return replace(self, ids=None, embeds=embed(ids, soft.table), tokens=self.ids)

    def inserted(self, soft: RowTokens) -> Inputs:
        """The rows with their blocks of soft tokens, before or after their prompts."""
        assert self.embeds is not None
        B, T = self.given
        layout, mask, packed, positions = self.layout, self.mask, self.packed, self.positions
        insertion = Insertion.into(layout, soft.place(layout.first, self.prompt_ends), soft.first, soft.block)
        to = insertion.logits_at if self.answers == "next token" else insertion.token_at
        ends = self.prompt_ends
        if ends is not None:
            ends = ends - layout.first + insertion.layout.first
        if soft.ragged and packed is None and mask is None:  # shorter blocks need padding
            mask = torch.ones(B, T, dtype=torch.long, device=self.embeds.device)
        if packed is not None:
            packed = PackedRows(insertion.layout.bounds.to(torch.int32), packed.longest + soft.longest)
            positions = None
        elif positions is not None:
            positions = insertion.positions(positions.expand(B, T))
        return replace(
            self,
            embeds=insertion.embeddings(self.embeds, soft.table),
            mask=mask if mask is None else insertion.attention_mask(mask),
            positions=positions,
            layout=insertion.layout,
            packed=packed,
            columns=to if self.columns is None else to.gather(1, self.columns),
            token_at=insertion.token_at if self.token_at is None else insertion.token_at.gather(1, self.token_at),
            source=insertion.source,
            prompt_ends=ends,
        )

    def with_row_ids(self, pad: int | None) -> Inputs:
        """The rows with ids that mark each row's last token for the head of a causal decoder."""
        assert self.embeds is not None
        ids = self.tokens
        if ids is None:
            ids = torch.full(self.given, -1, device=self.embeds.device)
        return replace(self, ids=row_ids(ids, self.source, self.mask, pad), embeds=None)

    def with_word_ids(self, word: int) -> tuple[Inputs, Tensor]:
        """The rows as ids, with a placeholder word for each soft token, and the mask of those, `[B, T']`."""
        assert self.tokens is not None
        ids, soft = self.tokens.masked_fill(self.tokens < 0, word), self.tokens < 0
        if self.source is not None:
            N, source = ids.numel(), self.source
            at = source.clamp(0, N - 1)
            ids = ids.flatten()[at].masked_fill((source < 0) | (source >= N), word)
            soft = (source >= N) | ((source >= 0) & soft.flatten()[at])
        return replace(self, ids=ids, embeds=None), soft

    def continuing(self, state: CacheState, soft: RowTokens | None, *, windowed: bool) -> Inputs:
        """Tokens that continue a cache.

        Args:
            soft: the soft tokens of the rows in the cache.
            windowed: whether any layer has a sliding window.
        """
        (B, T), k = self.given, 0 if soft is None else soft.longest
        S, mask, positions = self.past + T, self.mask, self.positions
        checks.check_mask(mask, B, (S - k, S, *buffer_length(self.cache, S)))
        if mask is not None and mask.shape[1] > S:  # of a whole static buffer: keys that don't exist yet are hidden
            mask = mask[:, : S - k]
        mask = state.mask_of(mask, k, (B, S))
        if windowed and mask is not None:
            check_contiguous(mask, T)
        if positions is not None and soft is not None:
            positions = positions + torch.tensor(soft.block, device=positions.device)[:, None]
        unchanged = mask is self.mask and positions is self.positions
        return self if unchanged else replace(self, mask=mask, positions=positions)

    def keywords(self, options: dict[str, Any], logits_to_keep: int | Tensor | None) -> dict[str, Any]:
        """The arguments of the base's forward, except those that are None.

        Args:
            logits_to_keep: in the original columns; None for a module of the base without logits.
        """
        if self.columns is not None and self.answers != "next token":
            options = self._moved.inputs(options)
        elif self.token_at is not None:
            options = options | MovedTokens(self.token_at, self.layout.shape[1], self.answers).types(options)
        if self.columns is not None and self.answers == "next token" and logits_to_keep is not None:
            logits_to_keep = keep_in(self.columns, self.layout.shape[1], logits_to_keep)
        positions = self.positions
        if self.packed is not None:
            options = {name: value for name, value in options.items() if name not in PACKING}
            if positions is None:
                positions = packed_positions(self.packed, self.layout.shape[1])
        keywords = options | {
            "input_ids": self.ids,
            "inputs_embeds": self.embeds,
            "attention_mask": self.mask,
            "position_ids": positions,
            "past_key_values": self.cache,
        }
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            keywords["logits_to_keep"] = logits_to_keep
        return {name: value for name, value in keywords.items() if value is not None}

    def in_columns_given(self, output: Any) -> Any:
        """The base's output with per-token values aligned to the original columns. (Logits of next tokens already
        are.)"""
        return output if self.columns is None else self._moved.output(output)

    @property
    def _moved(self) -> MovedTokens:
        assert self.columns is not None
        return MovedTokens(self.columns, self.layout.shape[1], self.answers)
