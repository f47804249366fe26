"""`make demo`: the four methods on a real model and real data, in one table, compared with PEFT.

Each run is a separate process, so that peak memory is measured separately. All output is written to runs/demo/.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from . import movie_snippets, smollm2
from .machine import machine
from .peft_peer import in_peft, without_soft_tokens
from .readme import percent
from .results import write_json

OUTPUT = Path(__file__).resolve().parents[1] / "runs" / "demo"
ANSWERS = tuple(f" {label}" for label in movie_snippets.LABELS)
BATCH, TEST_ROWS, PEFT_STEPS, SEED = 16, 200, 3, 0
INSTRUCTION = "Classify the sentiment of the movie review as positive or negative. Review, then sentiment:\n"
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class MethodRun:
    """A method and its initialisation; learning rates are the library's own, as in `softkv train`."""

    title: str
    method: str
    settings: dict[str, Any]
    peft: str | None  # PEFT's name of the same method

    def config(self) -> Any:
        import softkv

        return getattr(softkv, self.method)(**self.settings)


RUNS = {
    "prompt-tuning": MethodRun(
        "Prompt-tuning",
        "PromptTuning",
        {"init": "text", "init_text": " Is the sentiment of this movie review positive or negative? It is"}
        | {"template": "[text] [Y]"},
        "PROMPT_TUNING",
    ),
    "p-tuning": MethodRun(
        "P-tuning",
        "PTuning",
        {"template": "Review: [text]\n[P1][P2][P3][P4] Sentiment, positive or negative: [P5][P6] [Y]"},
        "P_TUNING",
    ),
    "prefix-tuning": MethodRun(
        "Prefix-tuning",
        "PrefixTuning",
        {"length": 16, "template": f"{INSTRUCTION}[text]\nSentiment: [Y]"},
        None,
    ),
    "p-tuning-v2": MethodRun(
        "P-tuning v2",
        "PTuningV2",
        {"init": "text", "init_text": INSTRUCTION, "template": "[text]\nSentiment: [Y]"},
        "PREFIX_TUNING",
    ),
}


@app.command()
def main(
    steps: int = typer.Option(40, help="Training steps per method."),
    peft: bool = typer.Option(True, help="Also time PEFT, for the methods that it has."),
    results_file: Path = typer.Option(OUTPUT / "results.json", help="JSON file for the figures."),
) -> None:
    """Train all four methods, time PEFT beside them, print the table, draw the curves and generate."""
    console = Console(width=max(Console().width, 118))
    started = time.perf_counter()
    smollm2.obtain()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, run in RUNS.items():
        console.rule(f"{run.title}: {steps} steps of {BATCH} rows")
        results[name] = _child("train", name, "--steps", str(steps))
        if peft and run.peft:
            console.print(f"PEFT {run.peft}: {PEFT_STEPS} timed steps")
            results[name]["peft"] = _child("peft", name)
    console.rule("Results")
    console.print(_table(results))
    _draw(results, OUTPUT / "learning_curves.png")
    settings = {"steps": steps, "batch": BATCH, "test_rows": TEST_ROWS, "seed": SEED}
    write_json(results_file, {"machine": machine(), "command": "make demo", "settings": settings, "results": results})
    console.print(f"Learning curves: {OUTPUT / 'learning_curves.png'}")
    console.rule("Generating with the trained P-tuning v2 prefix")
    _generate(console, "p-tuning-v2")
    console.print(f"{time.perf_counter() - started:.0f} s in all")


@app.command()
def train(name: str, steps: int = 40) -> None:
    """One method: evaluate, train, evaluate. Writes its adapter and its results."""
    import torch
    from transformers import ProgressCallback, TrainerCallback, TrainingArguments

    import softkv
    from softkv.train.callbacks import ProgressBar
    from softkv.train.classification import accuracy, classify

    torch.manual_seed(SEED)
    model, tokenizer = smollm2.load()
    run, folder = RUNS[name], OUTPUT / name
    soft_model = softkv.attach(model, run.config(), tokenizer=tokenizer)
    test = movie_snippets.read("test")[:TEST_ROWS]

    def evaluate() -> dict[str, Any]:
        soft_model.eval()
        scores = classify(soft_model, tokenizer, [{"text": row["text"]} for row in test], ANSWERS)
        result = accuracy(scores, [movie_snippets.LABELS.index(row["label"]) for row in test])
        print(f"{run.title}: accuracy on {TEST_ROWS} test rows {result}", flush=True)
        return {"value": result.value, "interval": result.interval, "rows": result.total}

    examples = _examples(soft_model.method, tokenizer, movie_snippets.read("train"))
    ends: list[float] = []

    class StepTimes(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    before = evaluate()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        warmup_steps=5,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=SEED,
        log_level="error",
        disable_tqdm=False,
        dataloader_pin_memory=False,
    )
    trainer = softkv.Trainer(soft_model, arguments, train_dataset=examples, callbacks=[StepTimes])
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    trainer.train()
    peak = _peak()
    soft_model.save_pretrained(folder)
    step_times = [end - start for start, end in pairwise(ends)]
    _write(
        name,
        "train",
        {
            "title": run.title,
            "method": repr(soft_model.method),
            "parameters": soft_model.num_trainable(),
            "before": before,
            "after": evaluate(),
            "seconds_a_step": statistics.median(step_times or [float("nan")]),
            "peak_gib": peak,
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        },
    )


@app.command()
def peft(name: str) -> None:
    """The same job in PEFT: padded rows, as it needs them, and a few timed steps."""
    import torch
    from transformers import DataCollatorForSeq2Seq

    import softkv

    torch.manual_seed(SEED)
    model, tokenizer = smollm2.load()
    run = RUNS[name]
    soft_model = softkv.attach(model, run.config(), tokenizer=tokenizer)
    method, length = soft_model.method, soft_model.method.length  # type: ignore[attr-defined]
    soft_model.detach()
    wrapped = in_peft(model, str(run.peft), length, encoder_size=256)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    collate = DataCollatorForSeq2Seq(tokenizer)
    rows = movie_snippets.read("train")[: BATCH * (PEFT_STEPS + 1)]
    examples = [without_soft_tokens(example) for example in _examples(method, tokenizer, rows)]
    times = []
    for start in range(0, len(examples), BATCH):
        batch = collate(examples[start : start + BATCH])
        began = time.perf_counter()
        loss = wrapped(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
        print(f"PEFT step {len(times)}: {times[-1]:.1f} s", flush=True)
    _write(name, "peft", {"seconds_a_step": statistics.median(times[1:]), "peak_gib": _peak()})


def _examples(method: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    return [method.encode(tokenizer, text=row["text"], answer=f" {row['label']}") for row in rows]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _write(name: str, command: str, result: dict[str, Any]) -> None:
    (OUTPUT / f"{name}.{command}.json").write_text(json.dumps(result))


def _child(command: str, name: str, *options: str) -> dict[str, Any]:
    """Runs one command of this file as a process of its own and reads what it wrote."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", command, name, *options], check=True, env=os.environ | quiet
    )
    return json.loads((OUTPUT / f"{name}.{command}.json").read_text())


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"SmolLM2-135M-Instruct, movie snippets, {BATCH} rows a step, fp32, {os.cpu_count()} CPU cores")
    columns = (
        "method",
        "trainable",
        "accuracy before",
        "after [95%]",
        "s / step",
        "peak GiB",
        "PEFT s / step",
        "PEFT GiB",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, result in results.items():
        peer = result.get("peft")
        table.add_row(
            RUNS[name].title,
            f"{result['parameters']:,}",
            percent(result["before"]),
            percent(result["after"]),
            f"{result['seconds_a_step']:.2f}",
            f"{result['peak_gib']:.2f}",
            f"{peer['seconds_a_step']:.2f}" if peer else "—",
            f"{peer['peak_gib']:.2f}" if peer else "—",
        )
    return table


def _draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (mean of 5 steps, nats)", yscale="log")
    for name, result in results.items():
        losses = result["losses"]
        smooth = [statistics.fmean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
        (line,) = axes.plot(range(1, len(losses) + 1), smooth)
        axes.annotate(f" {RUNS[name].title}", (len(losses), smooth[-1]), color=line.get_color(), va="center")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _generate(console: Console, name: str) -> None:
    import torch

    import softkv

    model, tokenizer = smollm2.load()
    soft_model = softkv.load(model, OUTPUT / name)
    for row in movie_snippets.read("test")[TEST_ROWS : TEST_ROWS + 4]:
        ids = soft_model.method.encode(tokenizer, text=row["text"])["input_ids"]
        prompt = torch.tensor([ids])
        output = soft_model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
        answer = tokenizer.decode(output[0, len(ids) :])
        console.print(f"{row['text']}\n  →[bold]{answer}[/bold] (labelled {row['label']})\n", highlight=False)


if __name__ == "__main__":
    app()
