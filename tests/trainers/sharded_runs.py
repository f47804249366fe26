"""Training of a base that is sharded over processes, as a program under torchrun:

python -m tests.trainers.sharded_runs FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import softkv
from softkv.train.processes import leave_together
from tests.training_runs import METHODS, attach, rows

STEPS = 3


def fsdp2(soft_model: softkv.SoftModel, **options: Any) -> softkv.SoftModel:
    for block in soft_model.base.model.layers:
        fully_shard(block, **options)
    fully_shard(soft_model, **options)
    return soft_model


def fsdp1(soft_model: softkv.SoftModel) -> torch.nn.Module:
    blocks = {type(soft_model.base.model.layers[0])}
    return FullyShardedDataParallel(
        soft_model, auto_wrap_policy=ModuleWrapPolicy(blocks), use_orig_params=True, device_id=torch.device("cpu")
    )


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
STRATEGIES: dict[str, Callable[[softkv.SoftModel], torch.nn.Module]] = {
    "FSDP2": fsdp2,
    "FSDP2, mixed precision": lambda soft_model: fsdp2(soft_model, mp_policy=BF16),
    "FSDP2, offloaded": lambda soft_model: fsdp2(soft_model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "FSDP2, checkpointed": lambda soft_model: (soft_model.gradient_checkpointing_enable(), fsdp2(soft_model))[1],
    "DDP": torch.nn.parallel.DistributedDataParallel,
}
RUNS = [("FSDP2", method) for method in METHODS]
RUNS += [(strategy, "p-tuning v2") for strategy in STRATEGIES if strategy != "FSDP2"]
RUNS += [("FSDP2, checkpointed", "prompt-tuning before"), ("FSDP2, checkpointed", "p-tuning v2 encoder")]


def train(soft_model: softkv.SoftModel, model: Any, examples: list[Any], ranks: int, rank: int = 0) -> list[float]:
    """Plain steps on this process's share of the rows; the losses of all rows."""
    pack = softkv.PackingCollator()
    count = sum(label != -100 for row in examples for label in row["labels"])
    optimizer = torch.optim.SGD([each for each in soft_model.parameters() if each.requires_grad], lr=0.5)
    losses = []
    for _ in range(STEPS):
        batch = pack(examples[rank::ranks])
        mine = sum(label != -100 for row in examples[rank::ranks] for label in row["labels"])
        loss = model.train()(**batch).loss * (mine / count)
        (loss * ranks).backward()  # gradients are averaged over processes
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(whole)
        losses.append(whole.item())
    return losses


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    results = {}
    for strategy, method in RUNS:
        soft_model = attach(method)
        examples = rows(soft_model.method, 6)
        model = STRATEGIES[strategy](soft_model)
        found = train(soft_model, model, examples, 2, dist.get_rank())
        results[f"{strategy}: {method}"] = found
        soft_model.save_pretrained(os.path.join(folder, strategy, method), is_main_process=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(results))
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1])
