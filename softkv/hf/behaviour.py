"""Properties of a frozen decoder, measured by running a few tokens instead of listing architectures.

State spaces, linear attention, convolutions and other state look at earlier tokens beside attention. Then rows must not
be packed, and K/V alone do not stand for what is in front of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softkv.hf.context import BlockInputs, PackedRows, SoftContext

TOKENS = 4


@dataclass(frozen=True)
class Behaviour:
    """
    Attributes:
        packs: whether a packed row's results do not depend on the rows in front of it.
        carries: whether the K/V of what stands in front of a row stand for it.
        pads: whether padding in front of a row changes nothing in it.
        embeds: whether embeddings say all about tokens: some models read ids beside them.
    """

    packs: bool
    carries: bool
    embeds: bool = True
    pads: bool = True


def behaviour_of(
    run: Callable[[SoftContext, Tensor, Tensor], Tensor], row: Tensor, blocks: list[BlockInputs]
) -> Behaviour:
    """Runs the second half of a row behind the K/V of the first, and the first half behind it as a row of its own.

    Args:
        run: hidden states `[1, T, C]` of the decoder from a context, the order of the row's tokens and their positions
            without a prefix.
        row: `[1, 4, C]`, those of the whole row.
        blocks: what reached its attention blocks in that run.
    """
    half, device = TOKENS // 2, row.device
    layers = {number: (block.key[:, :, :half], block.value[:, :, :half]) for number, block in enumerate(blocks)}
    context = SoftContext(
        layers,
        index=torch.tensor([0, -1], device=device),
        window_covers=True,
        slots=torch.tensor([half, 0], device=device),
        rows=PackedRows(torch.tensor([0, half, TOKENS], dtype=torch.int32, device=device), half),
    )
    tokens = torch.arange(TOKENS, device=device).roll(half)
    behind, first = run(context, tokens, torch.arange(half, device=device).repeat(2)[None])[0].split(half)
    return Behaviour(packs=same(first, row[0, :half]), carries=same(behind, row[0, half:]))


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding alone may make."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def nearly_embedded(base: Any, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Embeddings of ids, not quite those of the vocabulary, in which some models would look them up. None where a model
    embeds into more than one tensor."""
    embeds = base.get_input_embeddings()(ids)
    return embeds.detach() * (1 + tolerance(dtype) / 4) if isinstance(embeds, Tensor) else None


def same(got: Tensor, want: Tensor) -> bool:
    """Whether some token is the same but for rounding. (Rounding may send one to another expert, hardly all.)"""
    error = (got - want).float().norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-6)
    return bool(error.min() < tolerance(want.dtype))
