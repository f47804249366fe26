"""Rows of encoders, padded, and what the naive run gives for them."""

import torch
from torch import Tensor

from tests.hf.encoders import PAD

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22, 23, 24, 25]]


def padded(rows: list[list[int]], side: str, extra: int = 1) -> dict[str, Tensor]:
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[r, at], mask[r, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def of_rows(output: Tensor, batch: dict[str, Tensor], rows: list[list[int]]) -> list[Tensor]:
    """The real tokens' part of each row, or the row's own where it is pooled."""
    mask = batch["attention_mask"].bool()
    return [row[mask[r]] if output.shape[1:2] == mask.shape[1:] else row for r, row in enumerate(output)]
