"""TRL's GRPOTrainer with prefix-tuning: the soft model generates, a reward function scores.

python examples/trl_grpo.py [--model FOLDER] [--steps 40]
"""

import tempfile
from typing import Any

import datasets
import trl
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import softkv
from softkv.benchmarks import movie_snippets, smollm2


def says_the_label(completions: list[str], label: list[str], **columns: Any) -> list[float]:
    """1 where a completion names the right label, less the longer it is."""
    return [(wanted in text) - len(text) / 1000 for text, wanted in zip(completions, label, strict=True)]


def main(model: str = "", steps: int = 40) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.bos_token
    method = softkv.PrefixTuning(length=16, init="vocabulary")
    soft_model = softkv.attach(AutoModelForCausalLM.from_pretrained(folder), method)
    prompts = [
        {"prompt": f"{row['text']} Positive or negative?", "label": row["label"]}
        for row in movie_snippets.read("train")[:400]
    ]
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=5e-3, num_generations=4, bf16=False,
        max_completion_length=8, per_device_train_batch_size=8, logging_steps=1, save_strategy="no", report_to=[],
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        soft_model,
        says_the_label,
        arguments,
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"mean reward: {rewards[0]:.3f} at the first step, {rewards[-1]:.3f} at the last")


if __name__ == "__main__":
    typer.run(main)
