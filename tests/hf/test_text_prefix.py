"""A text as a prefix is that text in context: rotary and learned positions, sliding windows, padding."""

from typing import Any

import pytest
import torch
import transformers

import softkv
from softkv.prefix import Prefix
from tests.hf.continuations import batch_of
from tests.hf.naive import close
from tests.hf.rows import LAYOUTS, padded, rows_for
from tests.hf.tiny import NAMES, TEXT, WINDOW, model_of, tokenizer

ROWS = rows_for("no soft tokens")


def in_context(model: Any, ids: list[int]) -> torch.Tensor:
    text = tokenizer()(TEXT)["input_ids"]
    return model(torch.tensor([text + ids])).logits[0, len(text) :]


@pytest.mark.parametrize("name", NAMES)
def test_untrained_start_from_a_text(name: str) -> None:
    """Rows shorter and longer than the window, and a text longer than it."""
    text = tokenizer()(TEXT)["input_ids"]
    assert len(text) > WINDOW
    assert max(len(row.ids) for row in ROWS) > WINDOW > min(len(row.ids) for row in ROWS)
    eager = model_of(name)
    wants = [in_context(eager, row.ids) for row in ROWS]
    model = softkv.attach(model_of(name), softkv.PTuningV2(init="text", init_text=TEXT), tokenizer=tokenizer()).eval()
    assert model.method.length == len(text)
    for arrange in LAYOUTS.values():
        batch, parts = arrange(ROWS)
        for got, want in zip(parts(model(**batch).logits), wants, strict=True):
            close(got, want)
    batch = batch_of([row.ids for row in ROWS], "right")
    together = model.generate(**batch, max_new_tokens=2 * WINDOW)
    for row, sequence in zip(ROWS, together, strict=True):
        alone = eager.generate(torch.tensor([text + row.ids]), max_new_tokens=2 * WINDOW)
        assert torch.equal(sequence[batch["input_ids"].shape[1] :], alone[0, len(text) + len(row.ids) :])


@pytest.mark.parametrize("name", NAMES)
def test_from_text(name: str) -> None:
    model = model_of(name).train()
    prefix = Prefix.from_text(model, tokenizer(), TEXT)
    assert all(module.training for module in model.modules())
    assert prefix.length == len(tokenizer()(TEXT)["input_ids"])
    assert prefix.window_covers
    assert not prefix.k.requires_grad
    # The same from an attached model, whose soft prompt is not applied.
    attached = softkv.attach(model_of(name), softkv.PTuningV2(length=2))
    for base in (attached, attached.base):
        close(Prefix.from_text(base, tokenizer(), TEXT).k, prefix.k)


def test_a_text_without_tokens() -> None:
    def no_tokens(text: str) -> dict[str, list[int]]:
        return {"input_ids": []}

    with pytest.raises(ValueError, match="at least one token, got ''"):
        Prefix.from_text(model_of("Llama"), no_tokens, "")


@pytest.mark.parametrize("name", NAMES)
def test_soft_tokens_of_a_text(name: str) -> None:
    """Prompt-tuning from a text, untrained, is that text before the row, or behind its prompt."""
    words = tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    eager, (batch, parts) = model_of(name), padded(ROWS, "left")
    for position in ("before", "after"):
        method = softkv.PromptTuning(init="text", init_text=TEXT, position=position)
        model = softkv.attach(model_of(name), method, tokenizer=tokenizer())
        for got, row in zip(parts(model(**batch).logits), ROWS, strict=True):
            at = 0 if position == "before" else row.prompt
            ids = [*row.ids[:at], *words, *row.ids[at:]]
            # From the column before the block, which carries the block's last logits.
            first = max(at, 1)
            close(got[first - 1 :], eager(torch.tensor([ids])).logits[0, first + len(words) - 1 :])


def test_caches_that_are_no_text() -> None:
    model, ids = model_of("Gemma2: softcap, alternating windows"), torch.arange(2, 12)[None]
    with pytest.raises(ValueError, match="layers without any"):
        Prefix.from_cache(transformers.DynamicCache(config=model.config))
    windowed = model(ids, use_cache=True).past_key_values  # made with the config: keeps a window of tokens
    with pytest.raises(ValueError, match=r"dropped some: it holds 4 of 10"):
        Prefix.from_cache(windowed)
    model = model_of("Mistral: a sliding window")  # all layers alike
    with pytest.raises(ValueError, match=r"dropped some: it holds 4 of 10"):
        Prefix.from_cache(model(ids, use_cache=True).past_key_values)


def test_from_a_static_cache() -> None:
    """Its layers are buffers: what is not filled yet is no slot."""
    model, ids = model_of("Llama"), torch.arange(2, 12)[None]
    cache = transformers.StaticCache(model.config, max_cache_len=16)
    model(ids, past_key_values=cache)
    torch.testing.assert_close(Prefix.from_cache(cache).k, Prefix.from_ids(model, ids).k)
