"""Encoders with task heads: K/V prefixes against a truth that concatenates them, row by row."""

import pytest
import torch
from torch import Tensor

import softkv
from tests.hf.encoders import PAD, TABLE, encoder, outputs_of, row_output
from tests.hf.naive import close

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


@pytest.mark.parametrize("method", ["p-tuning v2", "prefix-tuning"])
@pytest.mark.parametrize(("family", "head"), TABLE)
def test_prefixes(family: str, head: str, method: str) -> None:
    truth = encoder(family, head)
    config = {"p-tuning v2": softkv.PTuningV2(length=3), "prefix-tuning": softkv.PrefixTuning(length=3)}[method]
    model = softkv.attach(encoder(family, head), config).eval()
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.normal_()
    layers = 3 if method == "p-tuning v2" else 1
    width = truth.config.hidden_size if family != "EuroBert" else 16
    assert sum(parameter.numel() for parameter in model.soft.parameters()) == 2 * 3 * width * layers
    wanted = [outputs_of(row_output(truth, model.soft.prefix(), row)) for row in ROWS]
    for side in ("right", "left"):
        batch = padded(ROWS, side)
        for n, output in enumerate(outputs_of(model(**batch))):
            for row, got in enumerate(of_rows(output, batch, ROWS)):
                close(got, wanted[row][n][0])
