"""Positions of tokens after a prefix in the stacks of an encoder-decoder: by position tables, position ids or relative
biases."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softkv.hf.positions import PAST_LENGTH


def shifted_output(table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], slots: int | Tensor) -> Tensor:
    """The output of a table for tokens shifted by `slots` positions: one number, or `[B]`."""
    given = dict(zip(inspect.signature(table.forward).parameters, args, strict=False)) | kwargs
    if isinstance(slots, int):
        return _shifted_by(table, given, slots)
    found: list[Tensor] = []
    for row in slots.tolist():
        states = _shifted_by(table, given, row)
        states = states if states.dim() == 3 else states[None]
        found.append(states[len(found) if len(states) == len(slots) else 0])
    return torch.stack(found)


def _shifted_by(table: nn.Module, given: dict[str, Any], slots: int) -> Tensor:
    if given.get("position_ids") is not None:
        return table.forward(**given | {"position_ids": given["position_ids"] + slots})
    return table.forward(**given | {PAST_LENGTH: given.get(PAST_LENGTH, 0) + slots})


@dataclass(frozen=True)
class SlotBiases:
    """The relative position biases (T5) of slots at the positions before the first token.

    Attributes:
        first: the first block with biases, which the other blocks of its stack reuse.
    """

    first: nn.Module

    @classmethod
    def of(cls, blocks: list[nn.Module]) -> SlotBiases | None:
        """From the blocks of a stack; None if they have no such biases."""
        found = [block for block in blocks if _has_biases(block)]
        return cls(found[0]) if found else None

    @torch.no_grad()
    def __call__(self, block: nn.Module, queries: int, before: int | Tensor, slots: int) -> Tensor:
        """Biases `[1, H, T, P]` of P slots.

        Args:
            block: an attention block.
            queries: T.
            before: the number of tokens before the queries, without slots.
            slots: P.
        """
        holder: Any = block if _has_biases(block) else self.first
        return holder.compute_bias(queries, slots, past_seen_tokens=before + slots)


def _has_biases(block: Any) -> bool:
    return bool(getattr(block, "has_relative_attention_bias", False)) and hasattr(block, "compute_bias")
