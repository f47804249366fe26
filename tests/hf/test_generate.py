"""Generation: token by token what recomputing everything without a cache gives, from sequences that begin with the ids
given."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.naive import Row, greedy, row_logits
from tests.hf.test_methods_on_models import rows_for
from tests.hf.tiny import METHODS, NAMES, attach, model_of

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


@cache
def truth(name: str, method: str, steps: int = STEPS) -> list[list[int]]:
    """The greedy answers to the prompts, each alone, all recomputed at every step."""
    soft, model = attach(name, method).soft.eval(), model_of(name)
    return [greedy(model, soft, prompt, steps) for prompt in prompts_of(method)]


def answers(sequences: Tensor, batch: dict[str, Tensor], repeats: int = 1) -> list[list[int]]:
    """What was generated, after a check that the ids given come first."""
    given = batch["input_ids"].clamp(min=0).repeat_interleave(repeats, 0)  # soft tokens come back as padding, 0
    assert torch.equal(sequences[:, : given.shape[1]], given)
    return sequences[:, given.shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_greedy_on_every_architecture(name: str, method: str) -> None:
    model = attach(name, method)
    for side in ("left", "right"):
        batch = batch_of(prompts_of(method), side, extra=1)
        assert answers(model.generate(**batch, max_new_tokens=STEPS), batch) == truth(name, method), side


GREEDY_WAYS: dict[str, dict[str, Any]] = {
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 2},
    "chunks of one token": {"prefill_chunk_size": 1},
    "scores and logits": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "a penalty that changes nothing": {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
}
MODELS = ["Llama", "Mistral: a sliding window", "Gemma2: softcap, alternating windows", "GPT2: learned positions"]


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    keep = batch["attention_mask"][row].bool()
    return {name: x[row : row + 1, keep] for name, x in batch.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", GREEDY_WAYS)
def test_greedy_in_every_way(name: str, method: str, way: str) -> None:
    model, options = attach(name, method), GREEDY_WAYS[way]
    batch = batch_of(prompts_of(method), "left")
    want = truth(name, method)
    # Prompt lookup is for one row.
    batches = [alone(batch, row) for row in range(4)] if way == "prompt lookup" else [batch]
    if "chunk" in way and method == "p-tuning v2 encoder":
        with pytest.raises(ValueError, match="reads whole prompts at once"):
            model.generate(**batch, max_new_tokens=STEPS, **options)
        return
    got = []
    for one in batches:
        output = model.generate(**one, max_new_tokens=STEPS, **options)
        got += answers(output if isinstance(output, Tensor) else output.sequences, one)
    assert got == want
