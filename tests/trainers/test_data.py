"""Ways to give a `Trainer` its data, and options of transformers' that touch batches or the embeddings."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import softkv
from softkv.hf.layout import IGNORED
from softkv.train.batches import shortened
from tests.hf.tiny import model_of, tokenizer
from tests.training_runs import METHODS, PLAIN_STEPS, attach, losses, rows, texts, trainer

COLLATORS = {"packed": softkv.PackingCollator, "padded": softkv.PaddingCollator}


@pytest.mark.parametrize("layout", COLLATORS)
@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning", "p-tuning v2", "p-tuning v2 encoder"])
def test_a_stream_trains_as_a_list(method: str, layout: str, tmp_path: Path) -> None:
    examples = rows(METHODS[method], 12)
    sampler = {"train_sampling_strategy": "sequential"}

    def run(data: Any) -> tuple[list[float], float]:
        options = {**PLAIN_STEPS, **sampler, "train_dataset": data, "eval_dataset": data}
        one = trainer(method, tmp_path, data_collator=COLLATORS[layout](), **options)
        one.train()
        return losses(one), one.evaluate()["eval_loss"]

    stream = datasets.Dataset.from_list(examples).to_iterable_dataset()
    (streamed, evaluated), (listed, expected) = run(stream), run(examples)
    assert streamed == pytest.approx(listed, rel=1e-6)
    assert evaluated == pytest.approx(expected, rel=1e-6)


def test_packed_rows_are_not_dispatched(tmp_path: Path) -> None:
    options = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match="dispatch_batches=True cuts batches by rows"):
        trainer("p-tuning v2", tmp_path, **options)
    stream = datasets.Dataset.from_list(rows(METHODS["p-tuning v2"], 8)).to_iterable_dataset()
    trainer("p-tuning v2", tmp_path, data_collator=softkv.PaddingCollator(), train_dataset=stream, **options).train()


def test_rows_made_by_several_processes_and_read_by_workers(tmp_path: Path) -> None:
    method = METHODS["p-tuning v2"]
    named = datasets.Dataset.from_list(texts(24))
    made = named.map(_encode, num_proc=2, remove_columns=named.column_names)
    assert [made[at] for at in range(24)] == rows(method, 24)
    one = trainer(method, tmp_path, train_dataset=made, dataloader_num_workers=2)
    one.train()
    plain = trainer(method, tmp_path)
    plain.train()
    assert losses(one) == pytest.approx(losses(plain), rel=1e-6)


def _encode(row: dict[str, str]) -> dict[str, list[int]]:
    return METHODS["p-tuning v2"].encode(tokenizer(), **row)


OPTIONS: dict[str, dict[str, Any]] = {
    "rows of like length": {"train_sampling_strategy": "group_by_length"},
    "evaluated before it starts": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
    "a smaller batch after out-of-memory": {"auto_find_batch_size": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_trainer(option: str, tmp_path: Path) -> None:
    """The batch is all rows, so the order of rows does not matter."""
    examples = rows(METHODS["p-tuning v2"], 8)
    data = {"train_dataset": examples, "eval_dataset": examples, "per_device_train_batch_size": 8, "max_steps": 2}
    one = trainer("p-tuning v2", tmp_path, **data, **OPTIONS[option])
    one.train()
    plain = trainer("p-tuning v2", tmp_path, **data)
    plain.train()
    assert losses(one) == pytest.approx(losses(plain), rel=1e-5)
    first = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry][:1]
    assert first == ([pytest.approx(losses(one)[0], rel=1e-5)] if "eval_on_start" in OPTIONS[option] else [])


def test_out_of_memory_halves_the_batch(tmp_path: Path) -> None:
    one = trainer("p-tuning v2", tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=2)
    compute, sizes = one.compute_loss, []

    def too_large(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        sizes.append(len(inputs["cu_seq_lens_q"]) - 1)
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return compute(model, inputs, **options)

    one.compute_loss = too_large
    one.train()
    assert sizes[0] == 8
    assert max(sizes[1:]) <= 7
    assert len(losses(one)) == 2


@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning", "p-tuning v2"])
def test_neftune_shakes_the_tokens_and_leaves(method: str, tmp_path: Path) -> None:
    plain, shaken = (trainer(method, tmp_path, max_steps=2, neftune_noise_alpha=alpha) for alpha in (None, 5.0))
    plain.train()
    shaken.train()
    assert losses(plain) != losses(shaken)
    again = trainer(method, tmp_path, soft_model=shaken.model, max_steps=1, learning_rate=0.0)
    again.train()
    third = trainer(method, tmp_path, soft_model=shaken.model, max_steps=1, learning_rate=0.0)
    third.train()
    assert losses(again) == losses(third)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    examples = rows(METHODS["p-tuning v2"], 8)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    one = trainer(
        "p-tuning v2",
        tmp_path,
        eval_dataset=examples,
        load_best_model_at_end=True,
        max_steps=20,
        learning_rate=30.0,  # soon worse
        callbacks=[transformers.EarlyStoppingCallback(early_stopping_patience=2)],
        **options,
    )
    one.train()
    assert one.state.global_step < 20
    seen = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert one.evaluate()["eval_loss"] == pytest.approx(min(seen), rel=1e-5)


# Long rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layout"),
    [(name, "packed") for name in METHODS if name != "p-tuning"] + [("p-tuning v2", "padded")],
)
def test_rows_past_the_positions_are_never_trained(method: str, layout: str, tmp_path: Path) -> None:
    """The model has 96 positions; its learned tokens take some of them."""
    slots = METHODS[method].length  # type: ignore[attr-defined]
    if method == "p-tuning v2 encoder":
        assert slots == 3

    def row(length: int) -> dict[str, Any]:
        return {"input_ids": [1, *([5] * (length - 1))], "labels": [IGNORED] * (length - 2) + [7, 8]}

    fits, too_long = [row(96 - slots), row(4)], [row(97 - slots), row(4)]
    options = {"data_collator": COLLATORS[layout](), "max_steps": 1}
    trainer(method, tmp_path, train_dataset=fits, **options).train()
    with pytest.raises(ValueError, match="97 positions, the model was made for 96"):
        trainer(method, tmp_path, train_dataset=too_long, **options).train()
    options["data_collator"] = COLLATORS[layout](max_length=96 - slots)
    trainer(method, tmp_path, train_dataset=too_long, **options).train()


def test_any_trainer_refuses_long_rows(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2").train()
    ids = torch.ones(1, 90, dtype=torch.long)
    with pytest.raises(ValueError, match=r"97 positions.*cut rows to 89 tokens"):
        soft_model(ids, labels=ids)
    with torch.no_grad():
        soft_model(ids, labels=ids)  # evaluation may look past them
    stretched = model_of("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    softkv.attach(stretched, softkv.PTuningV2(length=7)).train()(ids, labels=ids)


def test_what_a_shortened_row_keeps() -> None:
    row = {"input_ids": [1, 5, -1, 6, 7, -2, 8, 9], "labels": [IGNORED] * 6 + [8, 9]}
    assert shortened(row, 8) is row
    assert shortened(row, None) is row
    assert shortened(row, 6) == {"input_ids": [1, -1, 7, -2, 8, 9], "labels": [IGNORED] * 4 + [8, 9]}
    with pytest.raises(ValueError, match="its prompt has only 3 tokens that may go"):
        shortened(row, 4)
    text = {"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}
    assert shortened(text, 3) == {"input_ids": [1, 5, 6], "labels": [1, 5, 6]}
    whole = softkv.train.batches.whole_row_labels(row)  # type: ignore[attr-defined]
    assert shortened(whole, 6)["prompt_lengths"] == 4
