"""Properties of a frozen decoder, measured by running a few tokens instead of listing architectures.

State spaces, linear attention, convolutions and other state carry information from earlier tokens outside attention.
Rows of such models must not be packed, and K/V alone do not represent what is in front of a row.
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
        packs: whether results of a packed row are independent of the rows in front of it.
        carries: whether the K/V of what is in front of a row represent it completely.
        pads: whether padding in front of a row does not change its results.
        embeds: whether embeddings represent tokens completely; some models read ids as well.
    """

    packs: bool
    carries: bool
    embeds: bool = True
    pads: bool = True


def behaviour_of(
    run: Callable[[SoftContext, Tensor, Tensor], Tensor], row: Tensor, blocks: list[BlockInputs]
) -> Behaviour:
    """Run the second half of a row after the K/V of the first, and the first half after it as a separate packed row.

    Args:
        run: returns hidden states `[1, T, C]` of the decoder, given a context, the order of the row's tokens, and their
            positions without a prefix.
        row: `[1, 4, C]`, the hidden states of the whole row.
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
    """The relative error that rounding alone may cause."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def nearly_embedded(base: Any, ids: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Embeddings of ids, slightly perturbed because some models look embeddings up in the vocabulary. None if a model
    embeds into more than one tensor."""
    embeds = base.get_input_embeddings()(ids)
    return embeds.detach() * (1 + tolerance(dtype) / 4) if isinstance(embeds, Tensor) else None


def same(got: Tensor, want: Tensor) -> bool:
    """Whether at least one token is equal up to rounding. (Rounding may route some tokens to other experts, but hardly
    all.)"""
    error = (got - want).float().norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-6)
    return bool(error.min() < tolerance(want.dtype))
