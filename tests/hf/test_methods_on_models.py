"""Every method on every architecture: logits and gradients of padded and packed batches are those of each row alone."""

from functools import partial

import pytest
import torch

import softkv
from tests.hf.naive import close, greedy, row_logits
from tests.hf.rows import LAYOUTS, direction, padded, rows_for, truth
from tests.hf.tiny import METHODS, NAMES, VOCAB, attach, model_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_rows_alone_are_the_truth(name: str, method: str) -> None:
    rows = rows_for(method)
    logits, gradients, loss = truth(name, method)
    model = attach(name, method)
    for layout, arrange in LAYOUTS.items():
        batch, parts = arrange(rows)
        output = model(**batch)
        for got, want in zip(parts(output.logits), logits, strict=True):
            close(got, want)
        assert output.loss.item() == pytest.approx(loss, rel=1e-5), layout
        model.zero_grad()
        total = zip(parts(output.logits), rows, strict=True)
        sum((got * direction(row, VOCAB)).sum() for got, row in total).backward()
        for key, parameter in model.soft.named_parameters():
            assert parameter.grad is not None, (layout, key)
            close(parameter.grad, gradients[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_head_in_every_row_is_the_same(name: str) -> None:
    """`head_once=False` is there to measure what running the head once saves."""
    method, rows = "prompt-tuning before", rows_for("prompt-tuning before")
    base = model_of(name)
    torch.manual_seed(1)
    model = softkv.attach(base, METHODS[method], head_once=False)
    logits, gradients, loss = truth(name, method)
    for arrange in LAYOUTS.values():
        batch, parts = arrange(rows)
        output = model(**batch, use_cache=False)
        assert output.loss.item() == pytest.approx(loss, rel=1e-5)
        for got, want in zip(parts(output.logits), logits, strict=True):
            close(got, want)
        total = zip(parts(output.logits), rows, strict=True)
        sum((got * direction(row, VOCAB)).sum() for got, row in total).backward()
        close(model.soft.embeddings.grad, gradients["embeddings"])
        model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("method", ["p-tuning v2", "prompt-tuning before", "prompt-tuning after"])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Bart: no position ids", "max_position_embeddings"),
        ("OPT: learned positions, a narrow embedding", "max_position_embeddings"),
        ("GPT2: learned positions", "n_positions"),
    ],
)
def test_more_columns_than_positions(name: str, size: str, method: str) -> None:
    """Packed rows and padding fit where each row does."""
    model, bare, rows = attach(name, method, **{size: 20}), model_of(name, "eager", **{size: 20}), rows_for(method)
    wants = [row_logits(bare, model.soft, row) for row in rows]
    layouts = {side: partial(padded, side=side, extra=12) for side in ("left", "right")}
    for layout, arrange in (layouts | {"packed": LAYOUTS["packed, restarting positions"]}).items():
        batch, parts = arrange(rows)
        assert batch["input_ids"].shape[1] > 20
        for got, want in zip(parts(model(**batch, use_cache=layout == "left").logits), wants, strict=True):
            close(got, want)
    prompts = [row.ids[: row.prompt] for row in rows]
    ids, mask = torch.zeros(len(rows), 24).long(), torch.zeros(len(rows), 24).long()
    for at, prompt in enumerate(prompts):
        ids[at, -len(prompt) :], mask[at, -len(prompt) :] = torch.tensor(prompt), 1
    truths = [greedy(bare, model.soft, prompt, 3) for prompt in prompts]
    for options in ({}, {"use_cache": False}):
        assert model.generate(ids, attention_mask=mask, max_new_tokens=3, **options)[:, -3:].tolist() == truths
