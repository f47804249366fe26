"""Trainer on heads of tasks: the model's own loss on padded rows, compute_metrics, resumed runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import softkv
from tests.hf.encoders import encoder
from tests.hf.task_decoders import decoder

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]


def examples(head: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, ids in enumerate(ROWS):
        row: dict[str, Any] = {"input_ids": ids}
        if head == "SequenceClassification":
            row["label"] = number
        elif head == "QuestionAnswering":
            row |= {"start_positions": 0, "end_positions": len(ids) - 1}
        else:
            row["labels"] = [token % 3 if at else -100 for at, token in enumerate(ids)]
        rows.append(row)
    return rows


def trainer(model: Any, directory: Path, data: Any, **options: Any) -> softkv.Trainer:
    more = options.pop("arguments", {})
    arguments = transformers.TrainingArguments(
        str(directory), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=3, **more
    )
    return softkv.Trainer(model, arguments, train_dataset=data, eval_dataset=data, **options)


MODELS = [
    ("Bert", "SequenceClassification"),
    ("Bert", "MaskedLM"),
    ("Roberta", "TokenClassification"),
    ("DistilBert", "QuestionAnswering"),
    ("Llama", "SequenceClassification"),
    ("Llama", "TokenClassification"),
]


def model_of(family: str, head: str) -> softkv.SoftModel:
    base = decoder(family, head) if family == "Llama" else encoder(family, head)
    torch.manual_seed(1)
    return softkv.attach(base, softkv.PTuningV2(length=3, init_std=0.1)).eval()


@pytest.mark.parametrize("label_logits_only", [True, False])
@pytest.mark.parametrize(("family", "head"), MODELS)
def test_the_loss_is_the_models_own(family: str, head: str, label_logits_only: bool, tmp_path: Path) -> None:
    model, data = model_of(family, head), examples(head)
    one = trainer(model, tmp_path, data, label_logits_only=label_logits_only)
    logits = []
    weights = []
    with torch.no_grad():
        for row in data:  # alone, by the task's formula
            output = model(torch.tensor([row["input_ids"]]))
            if head == "QuestionAnswering":
                logits += [output.start_logits[0], output.end_logits[0]]
                weights += [torch.tensor(row["start_positions"]), torch.tensor(row["end_positions"])]
            elif head == "SequenceClassification":
                logits, weights = [*logits, output.logits[0]], [*weights, torch.tensor(row["label"])]
            else:
                logits, weights = [*logits, *output.logits[0]], [*weights, *torch.tensor(row["labels"])]
    losses = [torch.nn.functional.cross_entropy(x, y) for x, y in zip(logits, weights, strict=True) if y >= 0]
    if head != "QuestionAnswering":  # whose own loss counts the padding's columns
        assert one.evaluate()["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    batch = one.data_collator(data)
    assert one.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-5)


def test_it_learns_and_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [
        {"input_ids": [5, 7 + 2 * (n % 2), *ids.tolist()], "labels": n % 2}
        for n, ids in enumerate(torch.randint(10, 60, (32, 3)))
    ]

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    def run(directory: Path, **more: Any) -> softkv.Trainer:
        arguments = {"learning_rate": 0.05, "max_steps": 24, "per_device_train_batch_size": 16, "save_steps": 20}
        return trainer(
            model_of("Bert", "SequenceClassification"),
            directory,
            data,
            arguments=arguments | more,
            compute_metrics=accuracy,
        )

    whole = run(tmp_path / "whole")
    before = whole.evaluate()["eval_accuracy"]
    whole.train()
    assert whole.evaluate()["eval_accuracy"] > max(0.8, before)
    half = run(tmp_path / "whole")
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    head = half.model.modules_to_save["default"].state_dict()
    assert any(not torch.equal(value, half.model.base.get_parameter(name)) for name, value in head.items())
    for mine, theirs in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_accumulated_batches_count_alike(tmp_path: Path) -> None:
    data = [{"input_ids": [5 + n, 6, 7], "labels": n % 3} for n in range(8)]
    moved = []
    for batch, steps in ((8, 1), (2, 4)):
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        one = trainer(model_of("Bert", "SequenceClassification"), tmp_path, data, arguments=more | {"optim": "sgd"})
        one.train()
        moved.append(one.model.soft.k.detach().clone())
    torch.testing.assert_close(*moved)


def test_columns_of_the_base_are_kept(tmp_path: Path) -> None:
    one = trainer(model_of("Bert", "SequenceClassification"), tmp_path, None)
    one._set_signature_columns_if_needed()
    assert {"token_type_ids", "attention_mask", "labels", "adapter_names"} <= set(one._signature_columns)


def test_packing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForTokenClassification expects padded rows, got PackingCollator"):
        trainer(model_of("Llama", "TokenClassification"), tmp_path, None, data_collator=softkv.PackingCollator())
