"""TRL's DPOTrainer with prompt-tuning. The reference is the same model without its prompt: `soft_model.base`.

python examples/trl_dpo.py [--model FOLDER] [--steps 40]
"""

import tempfile

import datasets
import trl
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import softkv
from softkv.benchmarks import movie_snippets, smollm2


def main(model: str = "", steps: int = 40) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.bos_token
    soft_model = softkv.attach(AutoModelForCausalLM.from_pretrained(folder), softkv.PromptTuning(length=16))
    rows = []
    for row in movie_snippets.read("train")[:400]:
        wrong = next(label for label in movie_snippets.LABELS if label != row["label"])
        rows.append({"prompt": row["text"], "chosen": f" {row['label']}", "rejected": f" {wrong}"})
    arguments = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=1e-2, beta=0.1, bf16=False, logging_steps=1,
        save_strategy="no", report_to=[],
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        soft_model,
        soft_model.base,  # called by itself, it has no prompt: no second copy is needed
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    print(f"reward margin: {margins[0]:.3f} at the first step, {margins[-1]:.3f} at the last")


if __name__ == "__main__":
    typer.run(main)
