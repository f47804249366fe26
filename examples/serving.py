"""Serving: a PEFT adapter and three others in one batch; a baked document; five ways to generate.

python examples/serving.py [--model FOLDER] [--adapter PEFT_FOLDER]
"""

import copy
import tempfile

import peft
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import softkv
from softkv.benchmarks import smollm2

DOCUMENT = "The library opens at nine in the morning and closes at six in the evening. On Sunday it is closed."
QUESTION = "When does the library close?"


def main(model: str = "", adapter: str = "", max_new_tokens: int = 20) -> None:
    folder = model or str(smollm2.obtain())
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(folder)
    if not adapter:  # an untrained one
        adapter, config = tempfile.mkdtemp(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(adapter)
    served = softkv.load(base, adapter)  # softkv's folders and PEFT's alike
    hint = softkv.PromptTuning(init="text", init_text=" Answer in one sentence.", template="[question] [Y]")
    served.add_adapter("hint", hint, tokenizer=tokenizer)
    inline = softkv.PTuning(template="[question] [P1][P2][P3] Answer: [Y]")
    served.add_adapter("inline", inline)
    served.add_adapter("prefix", softkv.PrefixTuning(length=8))
    baked = softkv.bake(base, text=DOCUMENT, tokenizer=tokenizer, template=" [question] [Y]")
    served.add_adapter("document", baked.soft.prefix())  # the text in context, computed once

    names = ["default", "hint", "inline", "prefix", "document", None]  # None: the bare model
    methods = {"inline": inline, "document": baked.method}
    rows = [methods.get(name, hint).encode(tokenizer, question=QUESTION)["input_ids"] for name in names]
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    ways = {
        "greedy": {},
        "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        "beams": {"num_beams": 3},
        "static cache": {"cache_implementation": "static"},
    }
    for way, options in ways.items():
        sequences = served.generate(**batch, adapter_names=names, max_new_tokens=max_new_tokens, **options)
        for name, tokens in zip(names, sequences[:, batch["input_ids"].shape[1] :], strict=True):
            print(f"{way:12}  {name or 'bare model':10}  {tokenizer.decode(tokens, skip_special_tokens=True)!r}")

    print("streaming     document    ", end="")
    served.set_adapter("document")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    served.generate(torch.tensor([rows[4]]), max_new_tokens=max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    typer.run(main)
