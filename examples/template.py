"""A template with P-tuning: soft tokens where the template puts them, produced by a prompt encoder.

python examples/template.py [--model FOLDER] [--steps 40]
"""

import tempfile

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import softkv
from softkv.benchmarks import movie_snippets, smollm2

TEMPLATE = "Review: [text]\n[P1][P2][P3][P4] Sentiment, positive or negative: [P5][P6] [Y]"
SENTENCES = ["A joy from start to end.", "I want these two hours of my life back."]


def main(model: str = "", steps: int = 40) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    method = softkv.PTuning(template=TEMPLATE, encoder="lstm")
    soft_model = softkv.attach(AutoModelForCausalLM.from_pretrained(folder), method, tokenizer=tokenizer)

    # encode() writes soft token [Pi] as the id -i; the answer's tokens are the labels.
    reviews = movie_snippets.read("train")
    rows = [soft_model.method.encode(tokenizer, text=row["text"], answer=row["label"]) for row in reviews]
    print(rows[0]["input_ids"])
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=min(5, steps),
        save_strategy="no",
        report_to=[],
    )
    softkv.Trainer(soft_model, arguments, train_dataset=rows).train()

    # Saved without the encoder: what it produced is all that inference needs.
    soft_model.save_pretrained(arguments.output_dir)
    soft_model = softkv.load(soft_model.detach(), arguments.output_dir)
    for sentence in SENTENCES:
        ids = torch.tensor([soft_model.method.encode(tokenizer, text=sentence)["input_ids"]])
        output = soft_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        print(f"{sentence} →{tokenizer.decode(output[0, ids.shape[1] :])}")


if __name__ == "__main__":
    typer.run(main)
