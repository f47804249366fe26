"""`python -m tools.generation_features --write`: runs PEFT through every generation feature that softkv is tested with,
and writes the table in docs/generation.md.

The rows are those of tests/hf/generation_rows.py, with the same calls and the same reference, which recomputes
everything without a cache in eager attention. PEFT gets the same soft prompt as files, on the same tiny random models,
and rows of equal length unless the feature concerns padding.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import softkv
from benchmarks.machine import machine
from benchmarks.results import read_json, write_json
from tests.hf.generation_rows import ROWS, GenerationRow, NaiveRows, told
from tests.hf.tiny import tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "generation_features.json"
PAGE = ROOT / "docs" / "generation.md"
BEGIN, END = "<!-- rows: begin -->\n", "<!-- rows: end -->\n"

# PEFT's method → the same in softkv: its sliding windows count prefix slots.
METHODS = {
    "prefix tuning": softkv.PTuningV2(length=7, window_covers=True),
    "prompt tuning": softkv.PromptTuning(length=3, position="before"),
}
PROMPTS = [[1, 17, 38, 5, 44], [1, 8, 55, 21, 30], [1, 29, 9, 50, 13]]
RAGGED = [[1, 17, 38], [1, 8, 55, 21, 30, 12, 40], [1, 29, 9, 50]]


def in_peft(row: GenerationRow, method: str) -> tuple[Any, Any]:
    """(a soft prompt as PEFT's, the same as softkv's learned parameters) on the row's model."""
    import peft

    torch.manual_seed(1)
    soft = softkv.attach(row.base(), METHODS[method], tokenizer=tokenizer()).eval()
    with tempfile.TemporaryDirectory() as folder:
        soft.save_pretrained(folder, format="peft")
        return peft.PeftModel.from_pretrained(row.base(), folder).eval(), soft.soft


def outcome(row: GenerationRow, method: str) -> str:
    """ "right", "wrong tokens", or the first line of the error."""
    model, soft = in_peft(row, method)
    prompts = RAGGED if row.padding else PROMPTS
    try:
        answers = row.way(model, prompts)
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0]}"
    return "right" if row.right(answers, NaiveRows(row.base(), soft, prompts)) else "wrong tokens"


def rendered(page: str) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    content = read_json(RESULTS)
    lines = [
        f"| way to generate | softkv | {' | '.join(f'PEFT {name}' for name in METHODS)} |",
        f"|---|---|{'---|' * len(METHODS)}",
    ]
    for row in ROWS:
        theirs = [_cell(content["results"][row.name][name]) for name in METHODS]
        lines.append(f"| {row.name} | {told(row)} | {' | '.join(theirs)} |")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    counts = [
        f"{name}: right in {sum(found[name] == 'right' for found in content['results'].values())} rows"
        for name in METHODS
    ]
    lines += ["", f"{len(ROWS)} rows. PEFT {'; '.join(counts)}. {versions}, {content['machine']['date'][:10]}."]
    return before + BEGIN + "\n".join(lines) + "\n" + END + after


def _cell(result: str) -> str:
    short = result if len(result) <= 90 else result[:87] + "…"
    return result if result in ("right", "wrong tokens") else f"`{short.replace('|', '/').replace('`', '')}`"


def main() -> None:
    """Measure and print; write the results and the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write the results, and the table of docs/generation.md")
    write = parser.parse_args().write
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    results: dict[str, dict[str, str]] = {}
    for row in ROWS:
        results[row.name] = {method: outcome(row, method) for method in METHODS}
        print(row.name, results[row.name], sep=": ", flush=True)
    if write:
        versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
        write_json(RESULTS, {"machine": machine(), "versions": versions, "results": results})
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
