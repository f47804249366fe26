"""TRL's SFTTrainer with P-tuning v2: packed rows, loss on completions only.

python examples/trl_sft.py [--model FOLDER] [--steps 40]
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
    method = softkv.PTuningV2(length=16, init="vocabulary")
    soft_model = softkv.attach(AutoModelForCausalLM.from_pretrained(folder), method)
    reviews = {name: movie_snippets.read(name)[:400] for name in ("train", "test")}
    data = {
        name: datasets.Dataset.from_list([{"prompt": row["text"], "completion": f" {row['label']}"} for row in rows])
        for name, rows in reviews.items()
    }
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=5e-3, packing=True, max_length=512, bf16=False,
        save_strategy="steps", save_steps=steps, report_to=[],
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        soft_model, arguments, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss on test rows: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")

    saved = f"{arguments.output_dir}/checkpoint-{steps}"  # what is learned, no base
    print("loaded again:", type(softkv.load(soft_model.detach(), saved).method).__name__)


if __name__ == "__main__":
    typer.run(main)
