"""Encoders' masked language models, and the heads of tasks on encoders and decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softkv.methods.base import SoftPrompt

from . import truth
from .methods import Subject
from .rows import Batch, Row, padded, rows
from .verdicts import verdict


class Heads(Subject):
    """Answers `[T, n]` for tokens, `[n]` for rows; of a span, n is its start and its end."""

    def __init__(self, of_rows: bool) -> None:
        self.of_rows = of_rows

    def bare(self, model: Any, ids: Tensor) -> Tensor:
        return self.answers(model(input_ids=ids))[0]

    def alone(self, bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
        ids = torch.tensor(row.ids)
        prefix, tokens = soft.prefix(), soft.soft_tokens()
        if prefix is not None:
            if truth.through_interface(bare):
                output = truth.concatenated(bare, prefix, ids[None])
            elif truth.cache_of(bare.base_model, ids[None]) is not None:
                output = truth.behind(bare, prefix, ids[None], bare.base_model)
            else:
                output = truth.written_out(bare, prefix, ids[None])
            return self.answers(output)[0]
        assert tokens is not None
        words = bare.get_input_embeddings()(ids.clamp(min=0))
        if soft.placement == "inline":
            embeds = torch.stack([tokens[-i - 1] if i < 0 else words[at] for at, i in enumerate(row.ids)])
        else:
            embeds = torch.cat([tokens, words] if soft.placement == "before" else [words, tokens])
        answer = self.answers(bare(inputs_embeds=embeds[None]))[0]
        at = len(tokens) if soft.placement == "before" else 0
        return answer if self.of_rows else answer[at : at + len(ids)]

    def batch(self, given: list[Row], side: str) -> Batch:
        batch, split = padded(given, side)
        return batch, list if self.of_rows else split

    @torch.no_grad()
    def base_pads(self, bare: Any) -> bool:
        """A word of MobileBERT sees its neighbours, padding among them."""
        given = rows(inline=False)
        batch, split = padded(given, "right")
        wanted = [bare.base_model(input_ids=torch.tensor([row.ids]))[0][0] for row in given]
        return verdict(split(bare.base_model(**batch)[0]), wanted) == "ok"

    def answers(self, output: Any) -> Tensor:
        """`[B, n]` for rows, `[B, T, n]` for tokens."""
        if "start_logits" in output:
            return torch.stack([output.start_logits, output.end_logits], -1)
        return output.logits
