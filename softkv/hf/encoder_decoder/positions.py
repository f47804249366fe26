"""The positions of tokens behind a prefix, in the stacks of an encoder-decoder: as transformers gives them to tables of
positions, or as position ids, or as relative biases."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PAST = "past_key_values_length"


def table_of(stack: nn.Module) -> nn.Module | None:
    """The module that gives tokens their positions, where it can be told what stands in front of them."""
    found = getattr(stack, "embed_positions", None)
    return found if isinstance(found, nn.Module) and _PAST in inspect.signature(found.forward).parameters else None


def size_of(table: nn.Module | None) -> int | None:
    """How many positions a table has; None where it grows."""
    return table.num_embeddings - int(getattr(table, "offset", 0)) if isinstance(table, nn.Embedding) else None


def takes_ids(stack: nn.Module) -> bool:
    """Whether a stack takes the positions of its tokens."""
    return "position_ids" in inspect.signature(stack.forward).parameters


def shifted(table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], slots: int | Tensor) -> Tensor:
    """What a table gives for tokens that stand `slots` positions later: one number, or `[B]`."""
    given = dict(zip(inspect.signature(table.forward).parameters, args, strict=False)) | kwargs
    if isinstance(slots, int):
        return _behind(table, given, slots)
    found: list[Tensor] = []
    for row in slots.tolist():
        states = _behind(table, given, row)
        states = states if states.dim() == 3 else states[None]
        found.append(states[len(found) if len(states) == len(slots) else 0])
    return torch.stack(found)


def _behind(table: nn.Module, given: dict[str, Any], slots: int) -> Tensor:
    if given.get("position_ids") is not None:
        return table.forward(**given | {"position_ids": given["position_ids"] + slots})
    return table.forward(**given | {_PAST: given.get(_PAST, 0) + slots})


@dataclass(frozen=True)
class SlotBiases:
    """The relative position biases (T5's) of slots that count as the positions before the first token.

    Attributes:
        first: the block whose biases the others of its stack take over.
    """

    first: nn.Module

    @classmethod
    def of(cls, blocks: list[nn.Module]) -> SlotBiases | None:
        """None for blocks without such biases."""
        found = [block for block in blocks if _has_biases(block)]
        return cls(found[0]) if found else None

    @torch.no_grad()
    def __call__(self, block: nn.Module, queries: int, before: int | Tensor, slots: int) -> Tensor:
        """Biases `[1, H, T, P]` of P slots.

        Args:
            block: an attention block.
            queries: T.
            before: tokens in front of the queries, slots left out.
            slots: P.
        """
        holder: Any = block if _has_biases(block) else self.first
        return holder.compute_bias(queries, slots, past_seen_tokens=before + slots)


def _has_biases(block: Any) -> bool:
    return bool(getattr(block, "has_relative_attention_bias", False)) and hasattr(block, "compute_bias")
