"""P-tuning v2 on a base with 4-bit weights (bitsandbytes).

python examples/quantised.py [--model FOLDER] [--steps 40]
"""

import tempfile

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

import softkv
from softkv.benchmarks import movie_snippets, smollm2


def main(model: str = "", steps: int = 40) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit)
    method = softkv.PTuningV2(length=16, init="vocabulary", template="[text]\nSentiment: [Y]")
    soft_model = softkv.attach(base, method, tokenizer=tokenizer)

    reviews = {name: movie_snippets.read(name)[:200] for name in ("train", "test")}
    rows = {
        name: [method.encode(tokenizer, text=row["text"], answer=row["label"]) for row in read]
        for name, read in reviews.items()
    }
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=5e-3, save_strategy="no", report_to=[]
    )
    trainer = softkv.Trainer(soft_model, arguments, train_dataset=rows["train"], eval_dataset=rows["test"])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss on test rows: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    soft_model.save_pretrained(arguments.output_dir)  # fp32 values of the prompt, no base


if __name__ == "__main__":
    typer.run(main)
