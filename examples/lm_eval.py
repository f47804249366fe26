"""lm-evaluation-harness on a custom task, with and without a soft prompt.

pip install "softkv[eval]"; python examples/lm_eval.py [--model FOLDER] [--adapter FOLDER]
"""

# ruff: noqa: E402
import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parent)
sys.path = [path for path in sys.path if path != FOLDER]  # or this file would be taken for the package `lm_eval`

import typer
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import softkv
from softkv.benchmarks import smollm2

REVIEWS = {"A joy from start to end.": 0, "Dull, loud and far too long.": 1}
ROWS = [{"text": text, "label": label} for text, label in REVIEWS.items()]
TASK = {
    "task": "sentiment",
    "custom_dataset": lambda **_: {"test": Dataset.from_list(ROWS)},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}\nSentiment:",
    "doc_to_choice": ["positive", "negative"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def main(model: str = "", adapter: str = "", batch_size: str = "auto") -> dict:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    hint = softkv.PTuningV2(init="text", init_text="Is the review positive or negative?")
    soft = softkv.load(base, adapter) if adapter else softkv.attach(base, hint, tokenizer=tokenizer).eval()
    if soft.soft.placement in ("after", "inline"):
        raise typer.BadParameter("lm-eval does not say where a row's prompt ends, and such soft tokens stand there")
    lm = HFLM(pretrained=soft, tokenizer=tokenizer, batch_size=batch_size, max_batch_size=64)
    options = {"tasks": [TASK], "task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    both = {"soft prompt": simple_evaluate(lm, **options)}
    with soft.disabled():
        both["bare model"] = simple_evaluate(lm, **options)
    for name, each in both.items():
        print(f"{name}: accuracy {each['results']['sentiment']['acc,none']:.2f}")
    return {name: each["samples"]["sentiment"] for name, each in both.items()}


if __name__ == "__main__":
    typer.run(main)
