"""Every row of the table in docs/generation.md: the truth, or the error that the table tells of."""

import functools
import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from tests.hf.continuations import prompts_of
from tests.hf.generation_rows import FED, LLAMA, MISTRAL, ROWS, GenerationRow, NaiveRows, batch_of
from tests.hf.naive import close
from tests.hf.tiny import METHODS, attach, tokenizer
from tools.generation_features import PAGE, rendered

NAMES = [method for method in METHODS if method != "p-tuning v2 of a text"]
SLOW = ["prompt-tuning after", "p-tuning v2", "p-tuning v2 encoder"]
TEXTS = ["w5 w6 w7", "w9 w10 w11 w12 w13"]


@functools.cache
def attached(name: str, method: str, layers: int) -> softkv.SoftModel:
    return attach(name, method, num_hidden_layers=layers).eval()


def cases() -> list[Any]:
    found = []
    for row in ROWS:
        for method in SLOW if row.slow else NAMES:
            if row.texts and method == "p-tuning":
                continue  # its prompts hold ids that texts don't
            if row.excluded and method not in SLOW:
                continue
            found.append(pytest.param(row, method, id=f"{row.name}-{method}"))
    return found


@pytest.mark.parametrize(("row", "method"), cases())
def test_row(row: GenerationRow, method: str) -> None:
    model = attached(row.model, method, row.base().config.num_hidden_layers)
    prompts = [tokenizer()(text)["input_ids"] for text in TEXTS] if row.texts else prompts_of(method)
    expected = row.refused.get(method, row.error)
    try:
        answers = row.way(model, prompts)
    except Exception as error:
        if not expected or not re.search(expected, str(error)):
            raise
        return
    assert not expected or row.excluded.startswith("needs "), "no error, but the table tells of one"
    assert row.right(answers, NaiveRows(row.base(), model.soft, prompts))


def test_the_table_says_what_was_measured() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "run `python -m tools.generation_features --write`"
    assert f"{len(ROWS)} rows" in page


class Seen(transformers.LogitsProcessor):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.ids: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids.append(input_ids.tolist())
        return scores


@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning"])
@pytest.mark.parametrize("beams", [1, 2])
def test_processors_are_shown_real_tokens(method: str, beams: int) -> None:
    model, seen = attached(LLAMA, method, 2), Seen()
    prompts = prompts_of(method)
    batch = batch_of(prompts, "right")
    # The first token is never an end: lengths count what is shown, too.
    options = {"max_new_tokens": 3, "min_new_tokens": 2, "eos_token_id": list(range(2, 60))}
    sequences = model.generate(**batch, **options, num_beams=beams, logits_processor=[seen])
    real = batch_of([[i for i in prompt if i >= 0] for prompt in prompts])["input_ids"]
    assert seen.ids[0] == real.repeat_interleave(beams, 0).tolist()
    assert torch.equal(sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"].clamp(min=0))
    if beams == 1:
        new = sequences[:, batch["input_ids"].shape[1] :]
        for step, shown in enumerate(seen.ids):
            assert shown == torch.cat([real, new[:, :step]], 1).tolist()


@pytest.mark.parametrize("method", NAMES)
def test_a_mask_may_be_left_out_after_the_first_forward(method: str) -> None:
    model, batch = attached(MISTRAL, method, 2), batch_of(prompts_of(method), "right")
    new = torch.tensor([FED] * len(batch["input_ids"]))
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], 1)
    with torch.no_grad():
        with_mask, without = (
            model(new, past_key_values=model(**batch, use_cache=True).past_key_values, **options).logits
            for options in ({"attention_mask": mask}, {})
        )
    close(without, with_mask)


def test_refusals() -> None:
    model, batch = attached(MISTRAL, "p-tuning v2", 2), batch_of([[5, 6, 7, 8], [9, 10, 11, 12]])
    cache = model(**batch, use_cache=True).past_key_values
    mask = torch.cat([batch["attention_mask"], torch.tensor([[1, 1], [0, 1]])], 1)
    with pytest.raises(ValueError, match="attention would count it"):
        model(torch.tensor([[13, 14], [0, 15]]), attention_mask=mask, past_key_values=cache)
    first = model.generate(**batch_of([[5, 6], [9, 10, 11]]), max_new_tokens=2, return_dict_in_generate=True)
    longer = batch_of([[5, 6, *FED, 13], [9, 10, 11, *FED]])
    with pytest.raises(ValueError, match="has these rows in other columns"):
        model.generate(**longer, past_key_values=first.past_key_values, max_new_tokens=2)
    with pytest.raises(ValueError, match='does not support cache_implementation="paged"'):
        model.generate(**batch, cache_implementation="paged")
    with pytest.raises(ValueError, match="token_healing rewrites prompts"):
        model.generate(**batch, token_healing=True, tokenizer=tokenizer())
    assert not hasattr(model, "generate_batch")
