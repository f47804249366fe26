"""Baking: the prefix made of what stands before every input gives the same logits and tokens."""

from typing import Any

import pytest
import torch

import softkv
from softkv.methods import PTuning
from tests.hf.continuations import batch_of
from tests.hf.naive import close
from tests.hf.rows import rows_for
from tests.hf.tiny import METHODS, NAMES, TEXT, WINDOW, model_of, tokenizer

ROWS = [row.ids for row in rows_for("no soft tokens")]
STEPS = WINDOW + 2
HEADS = {  # templates whose soft tokens all stand before the first field, and what is left of them
    "[P1][P2] [X] [Y]": " [X] [Y]",
    "w5 [P2] w6 w7 [P1]: [X] and [Z]w8 [Y]": " [X] and [Z]w8 [Y]",
    "w5 w6 [P1][X] [Y]": "[X] [Y]",
    "[P1] w9 [Y]": " [Y]",
}


@torch.no_grad()
def answers(model: softkv.SoftModel, rows: list[list[int]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits and generated tokens of rows in one right-padded batch."""
    batch = batch_of(rows, "right", extra=1)
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=STEPS)[:, -STEPS:]
    return [one[: len(row)] for one, row in zip(logits, rows, strict=True)], tokens.tolist()


def same(baked: softkv.SoftModel, model: softkv.SoftModel, skipped: int = 0, rows: Any = ROWS) -> None:
    """The baked model's answers to rows, without the `skipped` ids that it holds, are those of the model."""
    logits, tokens = answers(baked, [row[skipped:] for row in rows])
    wanted, wanted_tokens = answers(model, rows)
    for got, want in zip(logits, wanted, strict=True):
        close(got, want[skipped:])
    assert tokens == wanted_tokens


@pytest.mark.parametrize("name", NAMES)
def test_prompt_tuning_before(name: str) -> None:
    model = softkv.attach(
        model_of(name), softkv.PromptTuning(length=WINDOW + 2, position="before", template="a [X][Y]")
    )
    baked = softkv.bake(model)
    assert baked.method == softkv.PTuningV2(length=WINDOW + 2, window_covers=True, template="a [X][Y]")
    assert baked.base is model.base
    same(baked, model)


@pytest.mark.parametrize("template", HEADS)
@pytest.mark.parametrize("name", ["Llama", "Gemma2: softcap, alternating windows", "GPT2: learned positions"])
def test_heads_of_templates(name: str, template: str) -> None:
    torch.manual_seed(1)
    model = softkv.attach(model_of(name), PTuning(template=template, encoder_size=8)).eval()
    baked = softkv.bake(model, tokenizer=tokenizer())
    assert baked.method.template == HEADS[template]
    fields: dict[str, str] = {"X": "w9 w8 w10 w11 w12 w13"} if "[X]" in template else {}
    fields |= {"Z": "w20 w21"} if "[Z]" in template else {}
    row = model.method.encode(tokenizer(), answer="w30 w31", **fields)
    rest = baked.method.encode(tokenizer(), answer="w30 w31", **fields)
    skipped = len(row["input_ids"]) - len(rest["input_ids"])
    assert skipped == baked.method.length
    assert {name: ids[skipped:] for name, ids in row.items()} == rest
    same(baked, model, skipped, [row["input_ids"]])


@pytest.mark.parametrize("name", NAMES)
def test_texts(name: str) -> None:
    eager, text = model_of(name), tokenizer()(TEXT)["input_ids"]
    for given in (TEXT, text):
        baked = softkv.bake(model_of(name), text=given, tokenizer=tokenizer())
        logits, tokens = answers(baked, ROWS)
        for row, got, generated in zip(ROWS, logits, tokens, strict=True):
            ids = torch.tensor([text + row])
            close(got, eager(ids).logits[0, len(text) :])
            assert eager.generate(ids, max_new_tokens=STEPS)[0, -STEPS:].tolist() == generated
    # Rows go on where the text ends: a BOS would stand in its middle.
    assert baked.method.encode(tokenizer(), X="w3 w4")["input_ids"] == [3, 4]


def test_a_baked_prefix_in_half_precision_is_the_head() -> None:
    model = softkv.attach(model_of("Llama", dtype=torch.bfloat16), METHODS["prompt-tuning before"]).eval()
    baked = softkv.bake(model)
    assert baked.soft.k.dtype == torch.float32
    batch = batch_of(ROWS, "right")
    with torch.no_grad():
        assert torch.equal(baked(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (METHODS["prompt-tuning after"], "soft tokens that stand before the input, got PromptTuning"),
        (METHODS["p-tuning"], "all soft tokens before the first field"),
        (METHODS["p-tuning v2"], "soft tokens that stand before the input, got PTuningV2"),
    ],
)
def test_what_can_not_be_baked(method: Any, message: str) -> None:
    model = softkv.attach(model_of("Llama"), method)
    with pytest.raises(ValueError, match=message):
        softkv.bake(model, tokenizer=tokenizer())


def test_what_baking_needs() -> None:
    model = softkv.attach(model_of("Llama"), PTuning(template="[P1] [X] [Y]", encoder_size=8))
    with pytest.raises(ValueError, match="needs the tokenizer of a template"):
        softkv.bake(model)
    for arguments in ((model, "w3"), (model.base, None)):
        with pytest.raises(TypeError, match="expects a SoftModel with soft tokens, or a transformers model and a text"):
            softkv.bake(arguments[0], text=arguments[1], tokenizer=tokenizer())
    with pytest.raises(ValueError, match="needs the tokenizer of a text"):
        softkv.bake(model.base, text="w3")
    with pytest.raises(ValueError, match="at least one token, got"):
        softkv.bake(model.base, text=[])
