"""Rows for each method, laid out as batches, and what the naive run gives for them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from tests.hf.naive import Row, close, row_logits
from tests.hf.tiny import VOCAB, attach, model_of

# Lengths and prompts of the rows, each with the reason it is awkward.
SHAPES = {
    "short, an answer of one token": (4, 3),
    "longer than the window": (12, 7),
    "no answer": (5, 5),
    "a prompt of one token": (6, 1),
}


def rows_for(method: str) -> list[Row]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length, prompt in SHAPES.values():
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        if method == "p-tuning":  # soft tokens in front, and spread over the prompt
            ids = [-1, *ids[: prompt - 1], -2, *ids[prompt - 1 : prompt], -3, *ids[prompt:]]
            prompt += 3
        rows.append(Row(ids, prompt))
    return rows


def direction(row: Row, vocab: int) -> Tensor:
    """A fixed random direction for the gradient of a row's logits."""
    return torch.randn(len(row.ids), vocab, generator=torch.Generator().manual_seed(len(row.ids)))


@cache
def truth(name: str, method: str) -> tuple[list[Tensor], dict[str, Tensor], float]:
    """(logits of each row, gradients, loss) of the rows alone."""
    soft = attach(name, method).soft
    model, rows = model_of(name, "eager"), rows_for(method)
    logits = [row_logits(model, soft, row) for row in rows]
    sum((one * direction(row, VOCAB)).sum() for one, row in zip(logits, rows, strict=True)).backward()
    gradients = {key: parameter.grad for key, parameter in soft.named_parameters()}
    targets = torch.cat([torch.tensor([*row.labels[1:], -100]) for row in rows])
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), targets)
    return [one.detach() for one in logits], gradients, loss.item()


Batch = tuple[dict[str, Any], Callable[[Tensor], list[Tensor]]]


def padded(rows: list[Row], side: str, extra: int = 2) -> Batch:
    """A padded batch, and how to get each row's part of `[B, T, ...]`."""
    width = max(len(row.ids) for row in rows) + extra
    ids, mask, labels = torch.full((len(rows), width), 0), torch.zeros(len(rows), width).long(), []
    labels = torch.full((len(rows), width), -100)
    places = []
    for r, row in enumerate(rows):
        at = 0 if side == "right" else width - len(row.ids)
        places.append(slice(at, at + len(row.ids)))
        ids[r, places[r]], labels[r, places[r]] = torch.tensor(row.ids), torch.tensor(row.labels)
        mask[r, places[r]] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch, lambda x: [x[r, place] for r, place in enumerate(places)]


def packed(rows: list[Row], lengths: bool) -> Batch:
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths, return_position_ids=not lengths)
    batch = collator([{"input_ids": row.ids, "labels": row.labels} for row in rows])
    return dict(batch), lambda x: list(x[0].split([len(row.ids) for row in rows]))


LAYOUTS: dict[str, Callable[[list[Row]], Batch]] = {
    "right-padded": lambda rows: padded(rows, "right"),
    "left-padded": lambda rows: padded(rows, "left"),
    "packed, restarting positions": lambda rows: packed(rows, lengths=False),
    "packed, cumulative lengths": lambda rows: packed(rows, lengths=True),
}


def sum_of(logits: list[Tensor], rows: list[Row]) -> Tensor:
    return torch.stack([(one * direction(row, VOCAB)).sum() for one, row in zip(logits, rows, strict=True)]).sum()


def assert_in_every_layout(
    model: Any, rows: list[Row], wants: list[Tensor], gradients: dict[str, Tensor | None]
) -> None:
    """In every layout a soft model has the logits of rows alone, and the gradients of their `sum_of`."""
    for layout, arrange in LAYOUTS.items():
        model.zero_grad()
        batch, parts = arrange(rows)
        got = parts(model(**batch).logits)
        for one, want in zip(got, wants, strict=True):
            close(one, want.detach())
        sum_of(got, rows).backward()
        for key, parameter in model.soft.named_parameters():
            assert parameter.grad is not None, (layout, key)
            close(parameter.grad, gradients[key], 2e-5)
