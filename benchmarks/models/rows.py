"""The rows for every model, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .configs import VOCAB

SHAPES = ((5, 3), (9, 4), (3, 2))  # tokens and prompt of each row
Batch = tuple[dict[str, Tensor], Callable[[Tensor], list[Tensor]]]  # and how its answers are those of rows


@dataclass(frozen=True)
class Row:
    ids: list[int]
    prompt: int


def rows(inline: bool) -> list[Row]:
    """Random ones, with soft tokens at negative ids if `inline`."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for length, prompt in SHAPES:
        ids = torch.randint(5, VOCAB - 8, (length,), generator=generator).tolist()
        if inline:
            ids = [-1, *ids[:prompt], -2, *ids[prompt:]]
            prompt += 2
        made.append(Row(ids, prompt))
    return made


def padded(given: list[Row], side: str) -> Batch:
    width = max(len(row.ids) for row in given)
    shape, places = (len(given), width), []
    ids, mask = torch.zeros(shape).long(), torch.zeros(shape).long()
    for r, row in enumerate(given):
        at = 0 if side == "right" else width - len(row.ids)
        places.append(slice(at, at + len(row.ids)))
        ids[r, places[r]], mask[r, places[r]] = torch.tensor(row.ids), 1
    return {"input_ids": ids, "attention_mask": mask}, lambda x: [x[r, place] for r, place in enumerate(places)]


def packed(given: list[Row]) -> Batch:
    lengths = [len(row.ids) for row in given]
    batch = {
        "input_ids": torch.tensor([[i for row in given for i in row.ids]]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    return batch, lambda x: list(x[0].split(lengths))


def prompt_lengths(given: list[Row]) -> Tensor:
    return torch.tensor([row.prompt for row in given])
