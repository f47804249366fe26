"""Small training runs on tiny random models, for tests in this process and in others.

As a program (under torchrun or accelerate launch) it trains every method and writes the losses:
    python -m tests.training_runs OUT rows=ROWS_A_PROCESS
It then trains one that leaves a checkpoint, and resumes the one beside OUT.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import softkv
import softkv.train.trainer
from softkv.methods import PTuning
from softkv.methods.base import Method
from softkv.train.processes import leave_together
from tests.hf.tiny import VOCAB, model_of, tokenizer

METHODS: dict[str, Method] = {
    "prompt-tuning after": softkv.PromptTuning(length=3),
    "prompt-tuning before": softkv.PromptTuning(length=3, position="before"),
    "p-tuning": PTuning(template="[P1] [X] [P2] and [P3] [Y]", encoder_size=16),
    "prefix-tuning": softkv.PrefixTuning(length=7),
    "p-tuning v2": softkv.PTuningV2(length=7),
    "p-tuning v2 through an MLP": softkv.PTuningV2(length=4, reparametrize=True, reparametrize_size=8),
    "p-tuning v2 encoder": softkv.PTuningV2(length=3, encoder="lstm", encoder_size=8),
}

# In the middle of the second epoch of twelve rows, four a step.
SAVED: dict[str, Any] = {"count": 12, "max_steps": 7, "save_strategy": "steps", "save_steps": 4}

# Steps as long as the gradients: Adam would hide a wrong scale and amplify rounding.
PLAIN_STEPS: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 3}


def texts(count: int, seed: int = 3) -> list[dict[str, str]]:
    """Random fields and answers of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> str:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(2, VOCAB, (length,), generator=generator).tolist())

    return [{"X": words(1, 9), "answer": words(1, 3)} for _ in range(count)]


def rows(method: Method, count: int, seed: int = 3) -> list[dict[str, Any]]:
    return [method.encode(tokenizer(), **row) for row in texts(count, seed)]


def attach(method: str | Method, dtype: torch.dtype = torch.float32, **options: Any) -> softkv.SoftModel:
    model = model_of("Llama", "eager", dtype)
    torch.manual_seed(1)
    return softkv.attach(model, METHODS[method] if isinstance(method, str) else method, **options)


def arguments(directory: Any, kind: Any = transformers.TrainingArguments, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
    }
    return kind(**(defaults | options))


def trainer(
    method: str | Method, directory: Any, *, count: int = 24, soft_model: Any = None, **options: Any
) -> softkv.Trainer:
    """A `Trainer` on random rows; options of the Trainer go to it, the rest to `TrainingArguments`."""
    mine = ("data_collator", "max_tokens", "label_logits_only", "eval_dataset", "train_dataset", "callbacks")
    own = {name: options.pop(name) for name in (*mine, "compute_metrics", "compute_loss_func") if name in options}
    soft_model = attach(method) if soft_model is None else soft_model
    own.setdefault("train_dataset", rows(soft_model.method, count))
    return softkv.Trainer(soft_model, arguments(directory, **options), **own)


def losses(one: softkv.Trainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def hurry() -> None:
    """Spares a run what takes most of its time: looking for garbage among all modules, and drawing."""
    gc.freeze()
    softkv.train.trainer.draw_learning_curve = lambda *arguments: None


def main(out: str, *options: str) -> None:
    hurry()
    settings = {name: int(value) for name, value in (option.split("=") for option in options)}
    results: dict[str, Any] = {}
    for method in METHODS:
        one = trainer(method, Path(out).with_suffix(""), per_device_train_batch_size=settings["rows"], **PLAIN_STEPS)
        one.train()
        weights = {name: value.double().sum().item() for name, value in one.model.soft.state_dict().items()}
        results[method] = {"losses": losses(one), "weights": weights, "processes": one.args.world_size}
    common = SAVED | {"per_device_train_batch_size": settings["rows"]}
    saved = trainer("p-tuning v2", Path(out).parent / "saved by two", **common)
    saved.train()
    resumed = trainer("p-tuning v2", Path(out).parent / "resumed by two", **(common | {"save_strategy": "no"}))
    resumed.train(resume_from_checkpoint=str(Path(out).parent / "saved by one" / "checkpoint-4"))
    results |= {"saved": losses(saved), "resumed": losses(resumed)}
    if one.is_world_process_zero():
        Path(out).write_text(json.dumps(results))
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
