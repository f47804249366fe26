"""What `softkv plan` says of a step on several devices, measured, as a part of `sharded_runs`."""

import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.distributed import DistributedConfig

import softkv
from softkv.profiling.allocations import peak
from softkv.profiling.plan import PlannedStep
from softkv.profiling.strategies import Layout
from softkv.train.label_logits import label_logits

LENGTH, ROWS, TOKENS, ANSWER = 48, 4, 192, 24
CONFIG = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=3000,
    max_position_embeddings=512,
)
METHODS = {
    "p-tuning-v2": softkv.PTuningV2(length=LENGTH),
    "prefix-tuning": softkv.PrefixTuning(length=LENGTH),
    "prompt-tuning": softkv.PromptTuning(length=LENGTH, position="before", init="random"),
}
LAYOUTS = [Layout(data=2), Layout(data=2, sharded=True), Layout(tensor=2)]
CASES = [(layout, method, False) for layout in LAYOUTS for method in METHODS]
CASES += [(layout, method, True) for layout in LAYOUTS[1:] for method in ("p-tuning-v2", "prompt-tuning")]


def job(layout: Layout, method: Any, checkpointing: bool) -> PlannedStep:
    rows = ROWS * layout.data
    one = PlannedStep(CONFIG, method, LENGTH, rows, TOKENS, ANSWER, torch.float32)
    return replace(one, checkpointing=checkpointing)


class Received(TorchDispatchMode):
    """Counts what a process of two receives in collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), str(func)
        given = sum(each.nbytes for each in tree_leaves(args) if isinstance(each, torch.Tensor))
        if "all_reduce" in name or "allreduce" in name:
            self.bytes += given  # 2·(n - 1)/n of it
        elif "all_gather_into_tensor" in name:
            self.bytes += given  # the other's part, as large as this one
        elif "_allgather_base" in name or "_reduce_scatter_base" in name:
            self.bytes += given / 3  # of a whole and a half
        return out


def measured(folder: str) -> dict[str, tuple[float, int, int]]:
    """Bytes that a process receives, holds of the base, and allocates at its peak, by case."""
    place = os.path.join(folder, "planned")
    if dist.get_rank() == 0:
        transformers.LlamaForCausalLM(CONFIG).save_pretrained(place)
    dist.barrier()
    return {str(case): _measure(place, *case) for case in CASES}


def _measure(place: str, layout: Layout, method: str, checkpointing: bool) -> tuple[float, int, int]:
    options: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=2)} if layout.tensor > 1 else {}
    base = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    model: Any = softkv.attach(base, METHODS[method]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if layout.sharded:
        for module in (*base.model.layers, model):
            fully_shard(module)
    elif layout.data > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    rows = torch.randint(1, CONFIG.vocab_size, (ROWS, TOKENS)).tolist()
    batch = softkv.PackingCollator()(
        [{"input_ids": row, "labels": [-100] * (TOKENS - ANSWER) + row[-ANSWER:]} for row in rows]
    )

    def step() -> None:
        output, targets = label_logits(model, dict(batch))
        torch.nn.functional.cross_entropy(output.logits, targets).backward()

    step()
    step()  # DDP broadcasts its buckets' order before the second
    with Received() as received:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
        step()
    held = sum((each.to_local() if hasattr(each, "to_local") else each).nbytes for each in base.parameters())
    return received.bytes, held, peak(allocations)
