"""`python -m benchmarks.learning_search`: what starts and learning rates give, on rows held out of the training rows.

The defaults of softkv's methods, and the rates at which the others run in `benchmarks.learning`, are chosen from these
runs: as long as the study's, one seed, no test row seen. A trial that has run is not run again.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer

from . import learning
from .learning import CONTESTANTS, Contestant, Learner
from .learning_sets import SETS
from .machine import machine
from .results import FOLDER, merge, read_json

RESULTS = FOLDER / "learning_rates.json"
DATA = ("movies", "glosses")
STEPS = 40

# By contestant. Factors are on the method's own rate.
RATES: dict[str, list[Any]] = {
    "P-tuning v2": [5e-3, 1e-2, 2e-2, 4e-2],
    "Prefix-tuning": [
        {"k": 5e-2, "v": 1.5e-2}, {"k": 1e-1, "v": 3e-2}, {"k": 2e-1, "v": 3e-2}, {"k": 2e-1, "v": 2e-2},
        {"k": 1e-1, "v": 1e-2}, {"k": 2e-1, "v": 1e-2}, {"k": 4e-1, "v": 1e-2},
    ],
    "Prompt-tuning": ["1x", "2x", "4x"],
    "P-tuning": [3e-4, 1e-3, 3e-3, 1e-2],
    "PEFT prefix tuning": [3e-3, 1e-2, 3e-2],
    "PEFT prompt tuning": [3e-2, 1e-1, 3e-1],
    "PEFT p-tuning": [1e-3, 3e-3],
    "LoRA, r = 8": [1e-3, 3e-3],
    "full fine-tuning": [1e-5, 3e-5, 1e-4],
}  # fmt: skip


def trials() -> Iterator[tuple[str, str, Contestant]]:
    """Name, data set and contestant of each."""
    for title, rates in RATES.items():
        for rate in rates:
            for data in DATA:
                yield f"{data}/{title}/{told(rate)}", data, replace(CONTESTANTS[title], rate=rate)


def told(rate: Any) -> str:
    """As the table says it."""
    if isinstance(rate, dict):
        return ", ".join(f"{name.upper()} {value:g}" for name, value in rate.items())
    return rate if isinstance(rate, str) else f"{rate:g}"


def run(data: str, contestant: Contestant) -> dict[str, Any]:
    """The record of one trial."""
    import torch

    torch.manual_seed(0)
    base, tokenizer = learning.LOADED
    learner = Learner(contestant, SETS[data], base, tokenizer, 0)
    learner.learn(STEPS, looks=())
    hits, loss = learner.measure(learner.dev)
    last = learner.losses[-5:]
    return {
        "accuracy": round(sum(hits) / len(hits), 4), "loss": round(loss, 4), "rows": len(hits), "steps": STEPS,
        "training_loss": round(sum(last) / len(last), 4), "machine": machine(),
    }  # fmt: skip


def main(
    case: list[str] = typer.Option([], help="Trials to run, DATA/CONTESTANT/RATE; * stands for anything."),
    output: Path = typer.Option(RESULTS, help="The file of results."),
) -> None:
    """Run what has not run, and print each record."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    learning.LOADED[:] = learning.load()
    fork = multiprocessing.get_context("fork")
    order = [name for name, _, _ in trials()]
    for name, data, contestant in trials():
        done = read_json(output)["results"] if output.exists() else {}
        if name in done or (case and not any(fnmatch(name, one) for one in case)):
            continue
        with fork.Pool(1) as pool:
            record = pool.apply(run, (data, contestant))
        merge(output, {name: record}, order)
        print(f"{name}: {record['accuracy']}, loss {record['loss']}", flush=True)


if __name__ == "__main__":
    typer.run(main)
