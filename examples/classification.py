"""Classification with P-tuning v2: keys and values for each layer, learned from film reviews.

python examples/classification.py [--model FOLDER] [--steps 40]
"""

import tempfile

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import softkv
from softkv.benchmarks import movie_snippets, smollm2
from softkv.train.classification import accuracy, classify, macro_f1

ANSWERS = ["positive", "negative"]


def main(model: str = "", steps: int = 40, test_rows: int = 100) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    method = softkv.PTuningV2(
        init="text",  # untrained, the prefix is this text in context
        init_text="Classify the sentiment of the movie review as positive or negative. Review, then sentiment:\n",
        template="[text]\nSentiment: [Y]",
    )
    soft_model = softkv.attach(AutoModelForCausalLM.from_pretrained(folder), method, tokenizer=tokenizer)
    train, test = movie_snippets.read("train"), movie_snippets.read("test")[:test_rows]

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        warmup_steps=min(5, steps),
        save_strategy="no",
        report_to=[],
    )
    rows = [soft_model.method.encode(tokenizer, text=row["text"], answer=row["label"]) for row in train]
    softkv.Trainer(soft_model, arguments, train_dataset=rows).train()

    soft_model.save_pretrained(arguments.output_dir)
    base = soft_model.detach()
    soft_model = softkv.load(base, arguments.output_dir)

    scores = classify(soft_model, tokenizer, [{"text": row["text"]} for row in test], ANSWERS)
    classes = [ANSWERS.index(row["label"]) for row in test]
    print(f"accuracy {accuracy(scores, classes)}, macro-F1 {macro_f1(scores, classes)} (95% confidence intervals)")


if __name__ == "__main__":
    typer.run(main)
