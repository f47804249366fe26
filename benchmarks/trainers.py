"""`python -m benchmarks.trainers`: which trainers, bases and strategies train soft prompts of softkv and PEFT
correctly.

Each case takes three steps and is compared with plain steps of the same library on the same base in one process:
"right" has equal losses, "wrong" has different ones without an error, "refused" is a ValueError, "fails" any other
error. Two-process cases run under torchrun.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

from .machine import machine
from .results import FOLDER, read_json, write_json

STEPS, RATE, LENGTH = 3, 0.2, 8
SIDES = ("softkv, P-tuning v2", "PEFT, prefix tuning", "softkv, prompt-tuning", "PEFT, prompt tuning")
CLOSE = 1e-3  # of a loss
Batch = dict[str, Any]
INTRODUCTION = """\
`python -m benchmarks.trainers`, {date}: three steps of a two-layer Llama on CPUs, compared with plain steps of the same
library on the same base in one process. "right": the losses are equal; "wrong": they differ and no error is raised;
"refused": a ValueError. DDP, FSDP2 and tensor parallelism run two gloo processes; peft {peft}, transformers
{transformers}.

"""


def base() -> Any:
    from .tiny import load

    return load()[0]


def attached(side: str, model: Any) -> Any:
    """The same prompt at every call, on a base."""
    import peft
    import torch

    import softkv

    torch.manual_seed(1)
    methods: dict[str, Callable[[], Any]] = {
        SIDES[0]: lambda: softkv.attach(model, softkv.PTuningV2(length=LENGTH)),
        SIDES[1]: lambda: peft.get_peft_model(
            model, peft.PrefixTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
        ),
        SIDES[2]: lambda: softkv.attach(model, softkv.PromptTuning(length=LENGTH, position="before", init="random")),
        SIDES[3]: lambda: peft.get_peft_model(
            model, peft.PromptTuningConfig(num_virtual_tokens=LENGTH, task_type="CAUSAL_LM")
        ),
    }
    return methods[side]().train()


def rows() -> list[Batch]:
    """Four of one length, with as many labels."""
    import torch

    ids = torch.randint(1, 200, (4, 12), generator=torch.Generator().manual_seed(2)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 12, "labels": [-100] * 8 + row[8:]} for row in ids]


def padded(rank: int = 0, ranks: int = 1) -> Batch:
    import torch

    mine = rows()[rank::ranks]
    return {name: torch.tensor([row[name] for row in mine]) for name in mine[0]}


def steps(model: Any, batch: Batch) -> list[float]:
    import torch
    import torch.distributed as dist

    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
        losses.append(whole.item())
    return losses


# One process ---------------------------------------------------------------------------------------------------------


def by_trainer(kind: str, side: str) -> list[float]:
    import transformers

    names = {"Trainer": "TrainingArguments", "Seq2SeqTrainer": "Seq2SeqTrainingArguments"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = getattr(transformers, names[kind])(
            folder, max_steps=STEPS, per_device_train_batch_size=4, optim="sgd", learning_rate=RATE, max_grad_norm=0.0,
            lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            log_level="error", save_steps=STEPS,
        )  # fmt: skip
        trainer = getattr(transformers, kind)(attached(side, base()), arguments, train_dataset=rows())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_sft(side: str) -> list[float]:
    import datasets
    import trl

    answers = {"completion_mask": [0] * 8 + [1] * 4}
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"]} | answers for row in rows()])
    from .tiny import load

    model, tokenizer = load()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=4, optim="sgd", learning_rate=RATE, max_grad_norm=0.0,
            lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
            log_level="error", save_strategy="no", gradient_checkpointing=False,
            completion_only_loss=True,
        )  # fmt: skip
        trainer = trl.SFTTrainer(attached(side, model), arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def packed(side: str) -> list[float]:
    import transformers

    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=False)
    batch = collator([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows()])
    return steps(attached(side, base()), dict(batch))


def checkpointed(side: str) -> list[float]:
    model = attached(side, base())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return steps(model, padded())


def with_lora(side: str) -> list[float]:
    import peft
    import torch

    model = base()
    torch.manual_seed(3)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))  # starts as nothing, and stays frozen
    model.requires_grad_(False)
    return steps(attached(side, model), padded())


def offloaded(where: str, side: str) -> list[float]:
    import accelerate

    with tempfile.TemporaryDirectory() as folder:
        model = base()
        if where == "memory":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, folder, execution_device="cpu")
        return steps(attached(side, model), padded())


def in_four_bits(side: str) -> list[float]:
    """Less the losses of the same weights, dequantised, and plus those of the base: right where they are equal."""
    import bitsandbytes as bnb
    import torch
    import transformers

    def load(folder: str) -> Any:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    with tempfile.TemporaryDirectory() as folder:
        base().save_pretrained(folder)
        plain = base()
        quantised = load(folder)
        for name, module in load(folder).named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                held: Any = module.weight
                weight = bnb.functional.dequantize_4bit(held.data, held.quant_state)
                plain.get_submodule(name).weight.data = weight.float()
        expected = steps(attached(side, plain), padded())
        found = steps(attached(side, quantised), padded())
    usual = steps(attached(side, base()), padded())
    return [a - b + c for a, b, c in zip(found, expected, usual, strict=True)]


# Two processes -------------------------------------------------------------------------------------------------------


def by_ddp(side: str) -> list[float]:
    import torch
    import torch.distributed as dist

    return steps(torch.nn.parallel.DistributedDataParallel(attached(side, base())), padded(dist.get_rank(), 2))


def by_fsdp2(side: str, *, checkpointing: bool = False) -> list[float]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = base()
    prompted = attached(side, model)
    if checkpointing:
        prompted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in (*model.model.layers, prompted):
        fully_shard(module)
    return steps(prompted, padded(dist.get_rank(), 2))


def by_heads(side: str) -> list[float]:
    import torch
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        base().save_pretrained(folder[0])
    dist.barrier()
    options: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=2)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float32, **options)
    return steps(attached(side, model), padded())


CASES: dict[str, dict[str, Callable[[str], list[float]]]] = {
    "one process": {
        "transformers' Trainer": lambda side: by_trainer("Trainer", side),
        "transformers' Seq2SeqTrainer": lambda side: by_trainer("Seq2SeqTrainer", side),
        "TRL's SFTTrainer": by_sft,
        "packed rows": packed,
        "gradient checkpointing": checkpointed,
        "LoRA in the base": with_lora,
        "base offloaded to memory": lambda side: offloaded("memory", side),
        "base offloaded to disk": lambda side: offloaded("disk", side),
        "base in 4 bits (bitsandbytes)": in_four_bits,
    },
    "two processes": {
        "DDP": by_ddp,
        "FSDP2": by_fsdp2,
        "FSDP2, gradient checkpointing": lambda side: by_fsdp2(side, checkpointing=True),
        "tensor parallel": by_heads,
    },
}


def verdict(case: Callable[[str], list[float]], side: str, expected: list[float]) -> str:
    try:
        found = case(side)
    except ValueError:
        return "refused"
    except Exception as error:  # whatever it is, it is an answer
        return f"fails ({type(error).__name__})"
    right = len(found) == STEPS and all(abs(a - b) < CLOSE for a, b in zip(found, expected, strict=True))
    return "right" if right else "wrong"


def work(place: str, side: str) -> None:
    """The cases of one place, in a process or two; the first one prints the verdicts."""
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    expected = steps(attached(side, base()), padded())
    if place == "two processes":
        dist.init_process_group("gloo")
    for name, case in CASES[place].items():
        found = verdict(case, side, expected)
        if place == "one process" or dist.get_rank() == 0:
            print(f"verdict: {name}: {found}", flush=True)
    os._exit(0)


def run(place: str, side: str) -> dict[str, str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"] if place == "two processes" else []
    command = [sys.executable, *launch, "-m", "benchmarks.trainers", place, side]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    try:
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600).stdout
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode()
    lines = [line.split(": ") for line in said.splitlines() if line.startswith("verdict: ")]
    return dict.fromkeys(CASES[place], "hangs") | {name: found for _, name, found in lines}


def main(*arguments: str) -> None:
    if arguments:
        return work(*arguments)
    results: dict[str, dict[str, str]] = {name: {} for cases in CASES.values() for name in cases}
    for place in CASES:
        for side in SIDES:
            for name, found in run(place, side).items():
                results[name][side] = found
                print(f"{side}: {name}: {found}", flush=True)
    content = {"machine": machine(), "command": "python -m benchmarks.trainers", "results": results}
    write_json(FOLDER / "trainers.json", content)


def table() -> str:
    """For docs/training.md."""
    content = read_json(FOLDER / "trainers.json")
    lines = [f"| | {' | '.join(SIDES)} |", "|---" * (len(SIDES) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(found[side] for side in SIDES)} |" for name, found in content["results"].items()]
    return (
        INTRODUCTION.format(**content["machine"] | {"date": content["machine"]["date"][:10]}) + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
