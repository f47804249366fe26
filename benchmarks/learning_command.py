"""`python -m benchmarks.learning_command`: what `softkv train` learns where nothing but the data is said.

The command is given the study's training rows, their template, the method's name and the study's dtype, and its prompt
is tested on the study's test rows. On `verbs` nothing was ever chosen. A run that is in the results is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer

from . import smollm2
from .learning import CONTESTANTS, DEV_ROWS, Learner, load, scored, short_rows
from .learning_sets import SETS, UNSEEN, DataSet
from .machine import machine
from .results import FOLDER, merge, read_json

RESULTS = FOLDER / "learning_command.json"
METHODS = {
    "P-tuning v2": "p-tuning-v2",
    "P-tuning": "p-tuning",
    "Prompt-tuning": "prompt-tuning",
    "Prefix-tuning": "prefix-tuning",
}


def main(
    case: list[str] = typer.Option([], help="Runs, DATA/METHOD; * stands for anything."),
    output: Path = typer.Option(RESULTS, help="The file of results."),
) -> None:
    """Run what has not run, and print each record."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    known = [f"{data}/{title}" for title in METHODS for data in (*SETS, *UNSEEN)]
    for name in known:
        done = read_json(output)["results"] if output.exists() else {}
        if name in done or (case and not any(fnmatch(name, one) for one in case)):
            continue
        data, title = name.split("/")
        record = run((SETS | UNSEEN)[data], title)
        merge(output, {name: record}, known)
        print(f"{name}: {record['correct']} of {record['rows']}, loss {record['loss']:.3f}", flush=True)


def run(data: DataSet, title: str) -> dict[str, Any]:
    """Train by the command, test as the study does."""
    import softkv

    base, tokenizer = load()
    learner = Learner(CONTESTANTS[title], data, base, tokenizer, 0)
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows.jsonl"
        train = short_rows(data, "train", tokenizer)[:-DEV_ROWS]
        rows.write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
        command = ["train", "-m", str(smollm2.obtain()), "--data", str(rows), "--answer", "label", "--cpu"]
        command += ["--method", METHODS[title], "--template", learner.model.method.template, "-o", f"{name}/run"]
        command += ["--dtype", str(base.dtype).removeprefix("torch.")]
        script = Path(sys.executable).with_name("softkv")
        said = subprocess.run([script, *command], check=True, capture_output=True, text=True).stdout
        learner.model = softkv.load(base, f"{name}/run")
    hits, loss = learner.measure(learner.test)
    return scored(hits, loss) | {"steps": int(said.split(" steps")[0].split()[-1]), "machine": machine()}


if __name__ == "__main__":
    typer.run(main)
