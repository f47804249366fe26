"""Generation with prompt-tuning: a few learned embeddings that ask for a sentence of a film review.

python examples/generation.py [--model FOLDER] [--steps 40]
"""

import tempfile

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, TrainingArguments

import softkv
from softkv.benchmarks import movie_snippets, smollm2


def main(model: str = "", steps: int = 40, max_new_tokens: int = 30) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    method = softkv.PromptTuning(
        length=20,
        position="after",  # between a row's prompt and its answer
        init="text",
        init_text=" sentence of a movie review:",
        template="A [label] [Y]",
    )
    soft_model = softkv.attach(AutoModelForCausalLM.from_pretrained(folder), method, tokenizer=tokenizer)

    rows = []
    ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []  # learn where to stop
    for row in movie_snippets.read("train"):
        example = soft_model.method.encode(tokenizer, label=row["label"], answer=row["text"])
        rows.append({name: ids + ending for name, ids in example.items()})
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        warmup_steps=min(5, steps),
        save_strategy="no",
        report_to=[],
    )
    softkv.Trainer(soft_model, arguments, train_dataset=rows).train()

    soft_model.eval()
    for label in movie_snippets.LABELS:
        ids = torch.tensor([soft_model.method.encode(tokenizer, label=label)["input_ids"]])
        print(f"{label}:", end="")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "streamer": streamer}
        soft_model.generate(ids, do_sample=True, temperature=0.8, **options)


if __name__ == "__main__":
    typer.run(main)
