"""P-tuning v2 on an encoder-decoder: it reads film reviews and writes their sentiment.

python examples/encoder_decoder.py [--model google-t5/t5-small] [--steps 100]
"""

import tempfile

import typer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments

import softkv
from softkv.benchmarks import movie_snippets


def main(model: str = "google-t5/t5-small", steps: int = 100) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    # A prefix in the self-attention of both stacks, and in the attention from the decoder to the encoder.
    method = softkv.PTuningV2(length=16, where=("encoder", "decoder", "cross"), template="sentiment: [text] [Y]")
    soft_model = softkv.attach(AutoModelForSeq2SeqLM.from_pretrained(model), method)
    rows = [
        method.encode_pair(tokenizer, text=row["text"], answer=row["label"]) for row in movie_snippets.read("train")
    ]
    arguments = Seq2SeqTrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        predict_with_generate=True,
        save_strategy="no",
        report_to=[],
    )
    softkv.Seq2SeqTrainer(soft_model, arguments, train_dataset=rows).train()

    soft_model.save_pretrained(arguments.output_dir)
    soft_model = softkv.load(soft_model.detach(), arguments.output_dir)
    for text in ("A joy from start to end.", "Two hours I want back."):
        batch = softkv.Seq2SeqCollator(0)([method.encode_pair(tokenizer, text=text)])
        tokens = soft_model.generate(**batch, max_new_tokens=4)
        print(f"{text} → {tokenizer.decode(tokens[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    typer.run(main)
