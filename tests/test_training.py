"""Training: every switch, collator, precision and number of processes gives the same losses; runs can be resumed."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, TrainerCallback

import softkv
from softkv.hf.layout import with_prompt_lengths
from softkv.train.batches import PaddingCollator, TokenBatches, whole_row_labels
from softkv.train.checkpoints import last_checkpoint
from softkv.train.label_logits import label_logits
from tests.hf.tiny import tokenizer
from tests.training_runs import METHODS, PLAIN_STEPS, SAVED, attach, losses, rows, trainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the search for garbage among all modules, and the picture, which take most of a short run."""
    gc.freeze()
    monkeypatch.setattr("softkv.train.trainer.draw_learning_curve", lambda *arguments: None)
    yield
    gc.unfreeze()


def loss_and_gradients(
    method: Any,
    examples: list[dict[str, Any]],
    collator: Any,
    directory: Path,
    dtype: Any = torch.float32,
    **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    switches = {"label_logits_only": options.pop("label_logits_only", True)}
    soft_model = attach(method, dtype, **options).train()
    one = trainer(method, directory, soft_model=soft_model, data_collator=collator, train_dataset=examples, **switches)
    loss = one.compute_loss(soft_model, dict(collator(examples)))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in soft_model.soft.named_parameters()}


def left_padded(examples: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = {} if "prompt_lengths" not in examples[0] else {"prompt_lengths": [e["prompt_lengths"] for e in examples]}
    examples = [{name: list(value) for name, value in e.items() if name != "prompt_lengths"} for e in examples]
    tokens = tokenizer()
    tokens.padding_side = "left"
    try:
        batch = DataCollatorForSeq2Seq(tokens)([{"attention_mask": [1] * len(e["input_ids"]), **e} for e in examples])
    finally:
        tokens.padding_side = "right"
    return dict(batch) | {name: torch.tensor(value) for name, value in lengths.items()}


# What can be switched or chosen without changing the loss: (collator, options of attach and Trainer).
SWITCHES: dict[str, tuple[Any, dict[str, Any]]] = {
    "padded": (PaddingCollator(), {}),
    "left-padded": (left_padded, {}),
    "restarting position_ids alone": (DataCollatorWithFlattening(), {}),
    "all logits": (softkv.PackingCollator(), {"label_logits_only": False}),
    "all logits, padded": (PaddingCollator(), {"label_logits_only": False}),
    "head in every row": (softkv.PackingCollator(), {"head_once": False}),
    "all switched off": (PaddingCollator(), {"head_once": False, "label_logits_only": False}),
}


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            got[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("method", METHODS)
def test_switches_leave_loss_and_gradients(method: str, tmp_path: Path) -> None:
    examples = rows(METHODS[method], 5)
    expected = loss_and_gradients(method, examples, softkv.PackingCollator(), tmp_path)
    assert all(gradient.abs().sum() > 0 for gradient in expected[1].values())
    for collator, options in SWITCHES.values():
        assert_same(loss_and_gradients(method, examples, collator, tmp_path, **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_row_as_labels(method: str, tmp_path: Path) -> None:
    """The full language-model loss; the prompt still ends where it did, so the block stays where it was."""
    examples = [whole_row_labels(row) for row in rows(METHODS[method], 5)]
    if METHODS[method] == METHODS["p-tuning v2 encoder"]:  # would read what it is to predict
        with pytest.raises(ValueError, match="it would see what it is to predict"):
            loss_and_gradients(method, examples, softkv.PackingCollator(), tmp_path)
        for example in examples:
            del example["prompt_lengths"]
    expected = loss_and_gradients(method, examples, softkv.PackingCollator(), tmp_path)
    for name, (collator, options) in SWITCHES.items():
        if name != "restarting position_ids alone" or "prompt_lengths" not in examples[0]:  # it drops prompt_lengths
            assert_same(loss_and_gradients(method, examples, collator, tmp_path, **options), expected)
    labels = with_prompt_lengths(softkv.PackingCollator()(examples))["labels"]
    assert (labels != -100).sum() == sum(token >= 0 for row in examples for token in row["input_ids"][1:])


@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning v2", "p-tuning v2 encoder"])
def test_several_answers_a_row(method: str, tmp_path: Path) -> None:
    """A conversation: labels in two places; the prompt ends at the first."""
    answers = (3, 4, 7, 8)  # their places in the row
    examples = [
        {"input_ids": list(range(1, n)), "labels": [at + 1 if at in answers else -100 for at in range(n - 1)]}
        for n in (12, 15, 10)
    ]
    expected = loss_and_gradients(method, examples, softkv.PackingCollator(), tmp_path)
    for collator, options in SWITCHES.values():
        assert_same(loss_and_gradients(method, examples, collator, tmp_path, **options), expected)


def test_a_loss_and_a_smoothing_of_ones_own(tmp_path: Path) -> None:
    examples = rows(METHODS["prompt-tuning after"], 5)
    batch = softkv.PackingCollator()(examples)

    def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:])

    plain = trainer("prompt-tuning after", tmp_path)
    custom = trainer("prompt-tuning after", tmp_path, compute_loss_func=mean_loss)
    torch.testing.assert_close(custom.compute_loss(custom.model, batch), plain.compute_loss(plain.model, batch))
    smoothed = [
        trainer("prompt-tuning after", tmp_path, label_smoothing_factor=0.3, label_logits_only=only)
        for only in (True, False)
    ]
    first, second = (one.compute_loss(one.model, dict(batch)) for one in smoothed)
    torch.testing.assert_close(first, second)
    assert first != plain.compute_loss(plain.model, dict(batch))


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_equals_one_large_batch(method: str, tmp_path: Path) -> None:
    runs = []
    for size, parts in ((8, 1), (2, 4)):
        one = trainer(
            method, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=parts, **PLAIN_STEPS
        )
        one.train()
        runs.append((losses(one), {name: value.clone() for name, value in one.model.soft.state_dict().items()}))
    torch.testing.assert_close(runs[0], runs[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method: str, tmp_path: Path) -> None:
    curves = []
    for checkpointing in (False, True):
        one = trainer(method, tmp_path, gradient_checkpointing=checkpointing, max_steps=2)
        one.train()
        curves.append(losses(one))
    torch.testing.assert_close(*curves, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["prompt-tuning before", "p-tuning", "p-tuning v2", "p-tuning v2 encoder"])
def test_bf16_base_and_autocast(method: str, tmp_path: Path) -> None:
    full = trainer(method, tmp_path)
    full.train()
    for dtype, autocast in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        one = trainer(method, tmp_path, soft_model=attach(method, dtype), bf16=autocast)
        one.train()
        assert {parameter.dtype for parameter in one.model.soft.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in one.model.base.parameters()} == {dtype}
        torch.testing.assert_close(losses(one), losses(full), atol=0.15, rtol=0.02)


def test_training_lowers_the_loss_of_every_method(tmp_path: Path) -> None:
    for method in METHODS:
        one = trainer(method, tmp_path, count=8, per_device_train_batch_size=8, max_steps=15, learning_rate=3e-2)
        one.train()
        curve = losses(one)
        assert curve[-1] < 0.95 * curve[0], method


def test_evaluation_logs_and_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    soft_model = attach("p-tuning v2")
    held_out = rows(soft_model.method, 10, seed=4)
    one = trainer(
        "p-tuning v2",
        tmp_path,
        soft_model=soft_model,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        per_device_eval_batch_size=4,
        max_steps=8,
        learning_rate=0.3,  # diverges on held-out rows, so the best is not the last
        report_to=["tensorboard"],
    )
    one.train()
    evaluated = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 4
    assert one.state.best_metric == min(evaluated)
    assert one.evaluate()["eval_loss"] == pytest.approx(min(evaluated), abs=1e-6)
    best = Path(one.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{2 * (1 + evaluated.index(min(evaluated)))}"
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {best.name}
    # The loss of a label over the whole data set, although batches differ in labels.
    output, targets = label_logits(soft_model.eval(), softkv.PackingCollator()(held_out))
    assert min(evaluated) == pytest.approx(torch.nn.functional.cross_entropy(output.logits, targets).item(), abs=1e-5)
    events = EventAccumulator(str(next((tmp_path).rglob("events.*")).parent)).Reload()
    assert len(events.Scalars("train/loss")) == 8
    assert len(events.Scalars("eval/loss")) == 5  # and the one above
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert one.model.config.use_cache  # the base keeps its config


def test_metrics_of_logits(tmp_path: Path) -> None:
    seen = {}

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        at = labels[:, 1:] >= 0
        seen["loss"] = torch.nn.functional.cross_entropy(logits[:, :-1][at], labels[:, 1:][at]).item()
        return {"accuracy": (logits[:, :-1].argmax(-1) == labels[:, 1:])[at].float().mean().item()}

    for collator in (softkv.PackingCollator(), PaddingCollator()):
        soft_model = attach("prompt-tuning after")
        held_out = rows(soft_model.method, 7)
        one = trainer(
            "p", tmp_path, soft_model=soft_model, eval_dataset=held_out, compute_metrics=metrics, data_collator=collator
        )
        result = one.evaluate()
        assert 0 <= result["eval_accuracy"] <= 1
        assert seen["loss"] == pytest.approx(result["eval_loss"], abs=1e-5)


def test_checkpoints_hold_what_is_learned_and_the_optimizer(tmp_path: Path) -> None:
    one = trainer("p-tuning v2 through an MLP", tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    one.train()
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {
        "softkv_config.json",
        "softkv.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    learned = sum(parameter.numel() for parameter in one.model.soft.parameters()) * 4
    assert (tmp_path / "checkpoint-2" / "softkv.safetensors").stat().st_size < learned + 4096
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size < 2 * learned + 16384


class StopAt(TrainerCallback):
    """Raises in the middle of a run, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"max_tokens": 40}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("method", ["prompt-tuning after", "p-tuning", "p-tuning v2 through an MLP"])
def test_a_resumed_run_is_the_uninterrupted_one(method: str, options: dict[str, int], tmp_path: Path) -> None:
    """Bitwise: losses, the order of rows over three epochs, weights; the second checkpoint is incomplete."""
    common = {"count": 10, "save_strategy": "steps", "save_steps": 2, "max_steps": 7, **options}
    whole = trainer(method, tmp_path / "whole", **common)
    whole.train()
    first = trainer(method, tmp_path / "cut", callbacks=[StopAt(5)], **common)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").write_text('{"epo')  # killed while it was written
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    torch.manual_seed(99)
    second = trainer(method, tmp_path / "cut", **common)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    for name, value in whole.model.soft.state_dict().items():
        assert torch.equal(second.model.soft.state_dict()[name], value), name


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        trainer("p-tuning v2", tmp_path).train(resume_from_checkpoint=True)
    trainer("p-tuning v2", tmp_path, save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match="expected prefix-tuning"):
        trainer("prefix-tuning", tmp_path).train(resume_from_checkpoint=True)
    longer = softkv.PTuningV2(length=8)
    with pytest.raises(ValueError, match=r"'length': 7.*'length': 8"):
        trainer(longer, tmp_path).train(resume_from_checkpoint=True)


def test_processes_that_would_read_other_rows(tmp_path: Path) -> None:
    """A checkpoint as two processes leave it, of eight rows a step or of batches of tokens."""
    trainer("p-tuning v2", tmp_path, save_strategy="steps", save_steps=4).train()
    file = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(file.read_text())
    kept = state["stateful_callbacks"]["RowsOfAStep"]["args"]
    assert kept == {"processes": 1, "rows": 4, "max_tokens": None}
    for changed, message in (
        ({"rows": 8}, r"2 processes that read 8 rows a step.*expected as many of 1 .*got 4"),
        ({"max_tokens": 40}, r"2 processes.*max_tokens differ.*expected 2 processes"),
    ):
        file.write_text(
            json.dumps(state | {"stateful_callbacks": {"RowsOfAStep": {"args": {**kept, "processes": 2, **changed}}}})
        )
        with pytest.raises(ValueError, match=message):
            trainer("p-tuning v2", tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_only_soft_models_are_trained(tmp_path: Path) -> None:
    soft_model = attach("p-tuning v2")
    with pytest.raises(TypeError, match="expects a SoftModel"):
        softkv.Trainer(soft_model.base)
    with pytest.raises(ValueError, match="max_tokens expects an integer from 1 to 2147483647, got 0"):
        trainer("p-tuning v2", tmp_path, max_tokens=0)


class TestTokenBatches:
    LENGTHS = (9, 3, 5, 7, 2, 8, 4, 6, 1, 5, 5, 3)

    def batches(self, **options: Any) -> TokenBatches:
        return TokenBatches(self.LENGTHS, **({"max_tokens": 12, "padded": False, "seed": 0, "epoch": int} | options))

    @pytest.mark.parametrize("padded", [False, True])
    def test_every_row_once_within_the_budget(self, padded: bool) -> None:
        batches = list(self.batches(padded=padded))
        assert sorted(row for batch in batches for row in batch) == list(range(12))
        for batch in batches:
            lengths = [self.LENGTHS[row] for row in batch]
            assert (max(lengths) * len(lengths) if padded else sum(lengths)) <= 12

    def test_another_order_every_epoch_of_the_same_length(self) -> None:
        epochs = [list(self.batches(epoch=lambda e=epoch: e)) for epoch in (0, 1, 0)]
        assert epochs[0] == epochs[2] != epochs[1]
        assert sorted(epochs[0]) == sorted(epochs[1])

    def test_processes_take_turns(self) -> None:
        whole = list(self.batches())
        shares = [list(self.batches(rank=rank, ranks=2)) for rank in range(2)]
        turns = [batch for turn in zip(*shares, strict=True) for batch in turn]
        assert turns[: len(whole)] == whole
        assert turns[len(whole) :] == whole[: len(turns) - len(whole)]

    def test_a_row_longer_than_a_batch(self) -> None:
        with pytest.raises(ValueError, match="row 0 has 9 tokens, more than max_tokens=8"):
            self.batches(max_tokens=8)

    def test_in_training(self, tmp_path: Path) -> None:
        sizes = []

        one = trainer("p-tuning v2", tmp_path, max_tokens=30, num_train_epochs=2, max_steps=-1)
        compute = one.compute_loss
        one.compute_loss = lambda model, inputs, **k: (
            sizes.append(inputs["input_ids"].shape[1]),
            compute(model, inputs, **k),
        )[1]
        one.train()
        assert max(sizes) <= 30
        assert sizes[: len(sizes) // 2] != sizes[len(sizes) // 2 :]  # another order in the second epoch
        assert sum(sizes) == 2 * sum(len(row["input_ids"]) for row in one.train_dataset)


def run(out: Path, rows_a_process: int, *launcher: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, "-m", "tests.training_runs", str(out), f"rows={rows_a_process}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node=2", "--standalone"),
    # Its --cpu starts one process or asks for MPI; with ACCELERATE_USE_CPU the other launcher's meet on gloo.
    "accelerate launch": ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_learn_as_one(launcher: str, tmp_path: Path) -> None:
    """On gloo: the same global batch, the same losses and weights, for every method; each resumes the other's run."""
    whole = trainer("p-tuning v2", tmp_path / "saved by one", **SAVED)
    whole.train()
    two = run(tmp_path / "two.json", 2, sys.executable, "-m", *LAUNCHERS[launcher])
    for method in METHODS:
        one = trainer(method, tmp_path, **PLAIN_STEPS)
        one.train()
        assert two[method]["processes"] == 2
        torch.testing.assert_close(two[method]["losses"], losses(one), atol=2e-5, rtol=1e-4)
        weights = {name: value.double().sum().item() for name, value in one.model.soft.state_dict().items()}
        torch.testing.assert_close(two[method]["weights"], weights, atol=2e-4, rtol=1e-4)
    resumed = trainer("p-tuning v2", tmp_path / "resumed by one", **(SAVED | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "saved by two" / "checkpoint-4"))
    for found in (two["saved"], two["resumed"], losses(resumed)):
        torch.testing.assert_close(found, losses(whole), atol=1e-4, rtol=1e-4)
