"""Prompts to generate behind, and what the naive run continues them with."""

import functools

import torch
from torch import Tensor

from tests.hf.naive import greedy
from tests.hf.rows import rows_for
from tests.hf.tiny import attach, model_of

STEPS = 5


def prompts_of(method: str) -> list[list[int]]:
    return [row.ids[: row.prompt] for row in rows_for(method)]


def batch_of(prompts: list[list[int]], side: str, extra: int = 0) -> dict[str, Tensor]:
    width = max(map(len, prompts)) + extra
    ids, mask = torch.zeros(len(prompts), width).long(), torch.zeros(len(prompts), width).long()
    for r, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[r, place], mask[r, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def truth(name: str, method: str, steps: int = STEPS) -> list[list[int]]:
    """The greedy answers to the prompts, each alone, all recomputed at every step."""
    soft, model = attach(name, method).soft.eval(), model_of(name)
    return [greedy(model, soft, prompt, steps) for prompt in prompts_of(method)]


def answers(sequences: Tensor, batch: dict[str, Tensor], repeats: int = 1) -> list[list[int]]:
    """What was generated, after a check that the ids given come first."""
    given = batch["input_ids"].clamp(min=0).repeat_interleave(repeats, 0)  # soft tokens come back as padding, 0
    assert torch.equal(sequences[:, : given.shape[1]], given)
    return sequences[:, given.shape[1] :].tolist()


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    keep = batch["attention_mask"][row].bool()
    return {name: x[row : row + 1, keep] for name, x in batch.items()}
