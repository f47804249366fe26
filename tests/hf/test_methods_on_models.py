"""Every method on every architecture: logits and gradients of padded and packed batches are those of each row alone."""

import pytest
import torch

import softkv
from tests.hf.naive import close
from tests.hf.rows import LAYOUTS, direction, rows_for, truth
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
