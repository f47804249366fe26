"""Multiple choice: a row holds its choices, `[B, n, T]`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import softkv
from softkv.methods.base import Method
from tests.hf.encoders import FAMILIES, PAD, row_output, shaken
from tests.hf.naive import close

ROWS = [[[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]], [[15, 16], [17, 18, 19, 20], [21, 22, 23]]]
METHODS: dict[str, Method] = {
    "p-tuning v2": softkv.PTuningV2(length=3),
    "prefix-tuning": softkv.PrefixTuning(length=3),
    "before": softkv.PromptTuning(length=2, position="before"),
    "after": softkv.PromptTuning(length=2),
}


def model_of(family: str) -> Any:
    return shaken(
        getattr(transformers, f"{family}ForMultipleChoice"),
        getattr(transformers, f"{family}Config")(**FAMILIES[family]),
    )


def batch_of(rows: list[list[list[int]]]) -> dict[str, Tensor]:
    width = max(len(choice) for row in rows for choice in row)
    ids = torch.full((len(rows), len(rows[0]), width), PAD)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        for n, choice in enumerate(row):
            ids[r, n, : len(choice)], mask[r, n, : len(choice)] = torch.tensor(choice), 1
    return {"input_ids": ids, "attention_mask": mask}


def attached(family: str, method: Method) -> Any:
    model = softkv.attach(model_of(family), method).eval()
    with torch.no_grad():
        for parameter in model.soft.parameters():
            parameter.normal_()
    return model


def score(truth: Any, soft: Any, choice: list[int]) -> Tensor:
    """The logit of one choice, alone in its row."""
    tokens = soft.soft_tokens()
    if tokens is None:  # a plain attention reads the prefix
        forward = truth.forward
        flattens = truth.config.model_type != "distilbert"
        truth.forward = lambda input_ids, position_ids: forward(
            input_ids[:, None], position_ids=position_ids[:, None] if flattens else position_ids
        )
        try:
            return row_output(truth, soft.prefix(), choice).logits[0, 0]
        finally:
            del truth.forward
    words = truth.get_input_embeddings()(torch.tensor(choice))
    row = torch.cat([tokens, words] if soft.placement == "before" else [words, tokens])
    return truth(inputs_embeds=row[None, None]).logits[0, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Albert"])
def test_choices_are_rows(family: str, method: str, tmp_path: Path) -> None:
    model = attached(family, METHODS[method])
    assert model.answers == "choice"
    truth = model_of(family)
    batch, labels = batch_of(ROWS), torch.tensor([2, 0])
    output = model(**batch, labels=labels)
    wanted = torch.stack([torch.stack([score(truth, model.soft, choice) for choice in row]) for row in ROWS])
    close(output.logits, wanted)
    close(output.loss, torch.nn.functional.cross_entropy(wanted, labels))
    names = [name for name, _ in model.soft.named_parameters()]
    got = torch.autograd.grad(output.loss, list(model.soft.parameters()))
    loss = torch.nn.functional.cross_entropy(wanted, labels)
    for name, one, want in zip(names, got, torch.autograd.grad(loss, list(model.soft.parameters())), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-3, atol=1e-5, msg=name)
    model.save_pretrained(tmp_path)
    again = softkv.load(model_of(family), tmp_path)
    assert torch.equal(again(**batch).logits, output.logits)


def test_rows_of_several_adapters() -> None:
    model = attached("Bert", METHODS["p-tuning v2"])
    model.add_adapter("other", METHODS["before"])
    batch = batch_of(ROWS)
    got = model(**batch, adapter_names=["other", None]).logits
    with model.using("other"):
        close(got[:1], model(**batch).logits[:1])
    with model.disabled():
        close(got[1:], model(**batch).logits[1:])


def test_training(tmp_path: Path) -> None:
    model = attached("Roberta", METHODS["p-tuning v2"])
    rows = [{"input_ids": row, "labels": 0} for row in ROWS]
    batch = softkv.TaskCollator(PAD, token_labels=False)(rows)
    for name, x in batch_of(ROWS).items():
        assert torch.equal(batch[name], x)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = model(**batch).loss
    softkv.Trainer(model, arguments, train_dataset=rows).train()
    assert model.eval()(**batch).loss < 0.8 * before


def test_what_is_refused() -> None:
    model = attached("Bert", METHODS["p-tuning v2"])
    batch = batch_of(ROWS)
    with pytest.raises(ValueError, match=r"expects input_ids \[B, choices, T\], got \[1, 3\]"):
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="attention_mask expects"):
        model(batch["input_ids"], attention_mask=batch["attention_mask"][:, 0])
    with pytest.raises(ValueError, match="one number of choices"):
        softkv.TaskCollator(PAD, token_labels=False)([{"input_ids": [[1], [2]]}, {"input_ids": [[1]]}])
