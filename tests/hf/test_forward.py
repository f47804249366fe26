"""`SoftModel.forward`: where prompts end, positions, what comes back, and rows that are odd."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import softkv
from softkv.methods.base import BaseShape, FrozenModel, Method, SoftPrompt
from softkv.prefix import Prefix
from tests.hf.continuations import batch_of
from tests.hf.naive import Row, close, row_logits
from tests.hf.rows import LAYOUTS, padded, rows_for, truth
from tests.hf.tiny import METHODS, NAMES, attach, model_of

MODELS = ["Llama", "Mistral: a sliding window", "GPT2: learned positions"]


@pytest.mark.parametrize("method", METHODS)
def test_prompt_lengths_stand_in_for_labels(method: str) -> None:
    model, rows = attach("Llama", method).train(), rows_for(method)
    for arrange in LAYOUTS.values():
        batch, parts = arrange(rows)
        del batch["labels"]
        output = model(**batch, prompt_lengths=torch.tensor([row.prompt for row in rows]))
        for got, want in zip(parts(output.logits), truth("Llama", method)[0], strict=True):
            close(got, want)


def test_prompt_lengths_that_do_not_fit() -> None:
    model, ids = attach("Llama", "prompt-tuning after"), torch.tensor([[0, 5, 6], [7, 8, 9]])
    for lengths, message in (
        ([3, 3], r"tokens, \[2, 3\], got \[3, 3\]"), ([-1, 2], r"got \[-1, 2\]"), ([2], r"expects \[2\] integers"),
        ([1.0, 2.0], r"expects \[2\] integers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(ids, attention_mask=ids.ne(0), prompt_lengths=torch.tensor(lengths))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_without_either_a_row_is_all_prompt(name: str, method: str) -> None:
    model = attach(name, method).eval()
    rows = [Row(row.ids, len(row.ids)) for row in rows_for(method)]
    batch, parts = padded(rows, "left")
    del batch["labels"]
    for got, row in zip(parts(model(**batch).logits), rows, strict=True):
        close(got, row_logits(model_of(name), model.soft, row))


ODD_ROWS = {
    "a prompt of length 0": [Row([7, 8, 9], 0), Row([5, 6, 7, 8], 2)],
    "one token": [Row([7], 1), Row([5, 6, 7, 8], 2)],
    "an answer that is the whole row, in every row": [Row([7, 8], 0), Row([7, 8, 9], 0)],
    "one row": [Row([7, 8, 9], 2)],
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "p-tuning"])
def test_odd_rows(name: str, method: str) -> None:
    model, eager = attach(name, method), model_of(name)
    for rows in ODD_ROWS.values():
        lengths = torch.tensor([row.prompt for row in rows])
        wants = [row_logits(eager, model.soft, row) for row in rows]
        for layout, explicit in itertools.product(LAYOUTS, (False, True)):
            batch, parts = LAYOUTS[layout](rows)
            if explicit:  # positions given, the same as those that are built
                batch["position_ids"] = torch.zeros_like(batch["input_ids"])
                for x in parts(batch["position_ids"]):
                    x[:] = torch.arange(len(x))
            batch["labels"] = None
            for got, want in zip(parts(model(**batch, prompt_lengths=lengths).logits), wants, strict=True):
                close(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_padding_harms_nobody(method: str) -> None:
    model, rows = attach("GPT2: learned positions", method), rows_for(method)
    for side in ("left", "right"):
        batch, parts = padded(rows, side)
        more = {key: torch.cat([x, torch.full_like(x[:1], -100 if key == "labels" else 0)]) for key, x in batch.items()}
        output = model(**more)
        assert not output.logits.isnan().any()
        output.loss.backward()
        assert not any(parameter.grad.isnan().any() for parameter in model.soft.parameters())
        for got, want in zip(parts(output.logits), truth("GPT2: learned positions", method)[0], strict=True):
            close(got, want)
        generated = model.generate(more["input_ids"], attention_mask=more["attention_mask"], max_new_tokens=3)
        assert len(generated) == len(rows) + 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_to_keep_counts_in_columns_given(method: str, layout: str) -> None:
    model = attach("Llama", method).eval()
    batch, _ = LAYOUTS[layout](rows_for(method))
    lengths = model(**batch)
    full, labels = lengths.logits, batch.pop("labels")
    B, T = batch["input_ids"].shape
    first = labels.ne(-100).int().argmax(1)
    prompts = torch.tensor([row.prompt for row in rows_for(method)])
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(5)) < 0.5
    for keep, want in (
        (1, full[:, -1:]),
        (3, full[:, -3:]),
        (torch.tensor([0, 4, 2]), full[:, [0, 4, 2]]),
        (first[:, None], full.take_along_dim(first[:, None, None], 1)),
        (mask, full[mask]),
    ):
        torch.testing.assert_close(model(**batch, prompt_lengths=prompts, logits_to_keep=keep).logits, want)


@pytest.mark.parametrize("method", METHODS)
def test_outputs(method: str) -> None:
    model = attach("Llama", method).eval()
    batch, parts = padded(rows_for(method), "left")
    output = model(**batch, output_hidden_states=True)
    last = output.hidden_states[-1]
    assert last.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(model.lm_head(last), output.logits)
    alone = model(
        torch.tensor([rows_for(method)[1].ids]), labels=torch.tensor([rows_for(method)[1].labels]),
        output_hidden_states=True,
    )  # fmt: skip
    for together, one in zip(output.hidden_states, alone.hidden_states, strict=True):
        close(parts(together)[1], one[0])
    loss, logits = model(**batch, return_dict=False)[:2]
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    if method != "p-tuning":
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, output.logits)
    for mask in (batch["attention_mask"].bool(), batch["attention_mask"].float()):
        torch.testing.assert_close(model(**{**batch, "attention_mask": mask, **(
            {"inputs_embeds": embeds} if method != "p-tuning" else {})}).logits, output.logits)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_positions_that_start_elsewhere(method: str) -> None:
    """Positions given move the row, behind its prefix; on a model with rotary positions alone that changes nothing but
    the distance to the prefix."""
    model, row = attach("GPT2: learned positions", method).eval(), rows_for(method)[1]
    ids, lengths = torch.tensor([row.ids]), torch.tensor([row.prompt])
    want = model(ids, prompt_lengths=lengths).logits
    torch.testing.assert_close(
        model(ids, prompt_lengths=lengths, position_ids=torch.arange(len(row.ids))[None]).logits, want
    )
    moved = model(ids, prompt_lengths=lengths, position_ids=torch.arange(3, len(row.ids) + 3)[None]).logits
    assert not torch.allclose(moved, want)


# A prefix of each row's own -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank(Method):
    """One prefix a row, of different lengths, one of them empty."""

    lengths: tuple[int, ...] = (4, 0, 6, 1)
    window_covers: bool = False
    template: str = "[X] [Y]"

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        return BankPrompt(self, base.shape)


class BankPrompt(SoftPrompt):
    def __init__(self, config: Bank, shape: BaseShape) -> None:
        super().__init__(config)
        sizes = (2, shape.layers, len(config.lengths), shape.kv_heads, max(config.lengths), shape.head_dim)
        self.kv = torch.nn.Parameter(torch.randn(sizes))

    def prefix(self) -> Prefix:
        config: Any = self.config
        return Prefix(*self.kv, torch.tensor(config.lengths), config.window_covers)


class OneOf(SoftPrompt):
    def __init__(self, bank: SoftPrompt, row: int) -> None:
        super().__init__(bank.config)
        whole = bank.prefix()
        assert whole is not None
        n = int(whole.lengths[row])
        self.one = Prefix(whole.k[:, [row], :, :n], whole.v[:, [row], :, :n], window_covers=whole.window_covers)

    def prefix(self) -> Prefix:
        return self.one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("covers", [False, True])
def test_a_prefix_of_each_row(name: str, covers: bool) -> None:
    torch.manual_seed(1)
    model = softkv.attach(model_of(name), Bank(window_covers=covers)).eval()
    rows, eager = rows_for("no soft tokens"), model_of(name)
    wants = [row_logits(eager, OneOf(model.soft, r), row) for r, row in enumerate(rows)]
    for arrange in LAYOUTS.values():
        batch, parts = arrange(rows)
        for got, want in zip(parts(model(**batch).logits), wants, strict=True):
            close(got, want)
    batch = batch_of([row.ids for row in rows], "left")
    beams = model.generate(**batch, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    for r, row in enumerate(rows):
        one = softkv.attach(model_of(name), Bank(window_covers=covers))
        one.adapters["default"] = OneOf(model.soft, r)
        alone = one.generate(torch.tensor([row.ids]), max_new_tokens=3, num_beams=2, num_return_sequences=2)
        assert torch.equal(beams[2 * r : 2 * r + 2, -3:], alone[:, -3:])
