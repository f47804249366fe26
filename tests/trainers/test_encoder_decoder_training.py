"""Trainers on encoder-decoders: losses over labels, resumed runs, evaluation by what is generated."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.hf.encoder_decoder_rows import READ, WRITTEN, attached
from tests.hf.encoder_decoders import model_of
from tests.hf.naive import close
from tests.hf.tiny import tokenizer

ROWS = [{"input_ids": ids, "labels": labels} for ids, labels in zip(READ, WRITTEN, strict=True)]
FAMILIES = ["T5", "Bart", "MBart: scaled embeddings", "M2M100: positions by ids"]  # the last shifts no labels outside
METHOD = softkv.PTuningV2(length=3, init_std=1.0)


def arguments(directory: Path, kind: Any = transformers.TrainingArguments, **more: Any) -> Any:
    options = {"learning_rate": 0.05, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    options |= {"seed": 1, "lr_scheduler_type": "constant"}
    return kind(str(directory), report_to=[], use_cpu=True, disable_tqdm=True, **options | more)


def trained(name: str, directory: Path, resume: bool = False, **more: Any) -> dict[str, torch.Tensor]:
    model = attached(name, METHOD)
    trainer = softkv.Trainer(model, arguments(directory, **more), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume or None)
    return {name: each.detach().clone() for name, each in model.soft.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_accumulated_batches_are_one_large_batch(name: str, tmp_path: Path) -> None:
    """Rows have different numbers of labels: the loss is the mean over labels, not over batches."""
    sizes = ((3, 1), (1, 3))
    whole, parts = (
        trained(name, tmp_path / str(size), max_steps=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=steps, optim="sgd", save_strategy="no", max_grad_norm=0.0)
        for size, steps in sizes
    )  # fmt: skip
    model = attached(name, METHOD)
    trainer = softkv.Trainer(model, arguments(tmp_path), eval_dataset=ROWS)
    batch = trainer.data_collator(ROWS)
    loss = model(**batch).loss
    loss.backward()
    for key, parameter in model.soft.named_parameters():
        close(whole[key], parameter.detach() - 0.05 * parameter.grad)
        close(parts[key], whole[key])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path) -> None:
    for name in ("T5", "Bart"):
        want = trained(name, tmp_path / f"{name} whole")
        trained(name, tmp_path / name, max_steps=2)
        got = trained(name, tmp_path / name, resume=True)
        for key, value in want.items():
            assert torch.equal(got[key], value)


def test_batches_by_tokens(tmp_path: Path) -> None:
    trainer = softkv.Trainer(attached("T5", METHOD), arguments(tmp_path), train_dataset=ROWS, max_tokens=13)
    sizes = [len(batch["input_ids"]) for batch in trainer.get_train_dataloader()]
    assert sizes == [1, 1, 1] or sum(sizes) == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_by_what_is_generated(name: str, tmp_path: Path) -> None:
    """softkv's trainer and transformers' own, with its collator: what generate gives."""
    model = attached(name, METHOD)
    options = {"predict_with_generate": True, "generation_max_length": 7, "per_device_eval_batch_size": 2}
    given = arguments(tmp_path, transformers.Seq2SeqTrainingArguments, **options)
    seen: list[Any] = []
    metric = lambda answer: seen.append(answer.predictions) or {}  # noqa: E731
    theirs = transformers.DataCollatorForSeq2Seq(tokenizer(), model=model)
    for kind, more in ((softkv.Seq2SeqTrainer, {}), (transformers.Seq2SeqTrainer, {"data_collator": theirs})):
        trainer = kind(model, given, eval_dataset=ROWS, compute_metrics=metric, **more)
        loss = trainer.evaluate()["eval_loss"]
        if kind is softkv.Seq2SeqTrainer:
            batch = softkv.Seq2SeqCollator(0)(ROWS)
            assert loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    want = [model.generate(torch.tensor([row]), max_length=7, do_sample=False)[0].tolist() for row in READ]
    for predictions in seen:
        for answer, row in zip(predictions.tolist(), want, strict=True):
            assert answer[: len(row)] == row


def test_transformers_trainer_trains(tmp_path: Path) -> None:
    base = model_of("T5")
    model = softkv.attach(base, METHOD)
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), model=model)
    trainer = transformers.Seq2SeqTrainer(
        model, arguments(tmp_path, transformers.Seq2SeqTrainingArguments), collator, train_dataset=ROWS
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = softkv.load(model_of("T5"), tmp_path / "checkpoint-4")
    batch = softkv.Seq2SeqCollator(0)(ROWS)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
