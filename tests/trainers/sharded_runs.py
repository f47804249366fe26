"""Training of a base that is sharded over processes, as a program under torchrun:

python -m tests.trainers.sharded_runs FOLDER

FOLDER holds the base, and the state of each method's run in one process, which every run here resumes.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import softkv
from softkv.train.processes import leave_together
from tests.trainers import planned_runs, split_runs
from tests.training_runs import METHODS, attach, hurry, rows

STEPS = 3
TENSOR_PARALLEL = "tensor parallel"
FSDP1 = "FSDP1"
OF_FSDP1 = ("p-tuning v2", "p-tuning v2 through an MLP")


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
    "FSDP2, checkpointed": lambda soft_model: (soft_model.gradient_checkpointing_enable(), fsdp2(soft_model))[1],
    "FSDP2, offloaded, mixed precision": lambda soft_model: fsdp2(
        soft_model, mp_policy=BF16, offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
    "DDP": torch.nn.parallel.DistributedDataParallel,
    TENSOR_PARALLEL: lambda soft_model: soft_model,
    f"{TENSOR_PARALLEL}, checkpointed": lambda soft_model: (soft_model.gradient_checkpointing_enable(), soft_model)[1],
}
RUNS = [(strategy, method) for strategy in ("FSDP2", TENSOR_PARALLEL) for method in METHODS]
RUNS += [(strategy, "p-tuning v2") for strategy in STRATEGIES if (strategy, "p-tuning v2") not in RUNS]
RUNS += [("FSDP2, checkpointed", "prompt-tuning before"), ("FSDP2, checkpointed", "p-tuning v2 encoder")]


def optimizer_of(soft_model: softkv.SoftModel) -> torch.optim.Optimizer:
    """With a state of its own, so that a run resumes as it was only where that is kept too."""
    return torch.optim.SGD([each for each in soft_model.parameters() if each.requires_grad], lr=0.2, momentum=0.5)


def train(
    soft_model: softkv.SoftModel,
    model: Any,
    optimizer: torch.optim.Optimizer,
    examples: list[Any],
    ranks: int,
    rank: int = 0,
) -> list[float]:
    """Plain steps on this process's share of the rows; the losses of all rows."""
    pack = softkv.PackingCollator()
    count = sum(label != -100 for row in examples for label in row["labels"])
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


def attach_split(method: str, base: str) -> softkv.SoftModel:
    """On a base that is split over the processes, whose random numbers differ."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, tp_plan="auto", dtype=torch.float32)
    torch.manual_seed(1 + dist.get_rank())
    return softkv.attach(model, METHODS[method])


def fsdp1_run(folder: str, method: str) -> list[float]:
    """Losses under FSDP1, whose shards are saved where the module around the model has gathered them."""
    soft_model = attach(method)
    model, optimizer = fsdp1(soft_model), optimizer_of(soft_model)
    found = train(soft_model, model, optimizer, rows(soft_model.method, 6), 2, dist.get_rank())
    place, first = os.path.join(folder, FSDP1, method), dist.get_rank() == 0
    with pytest.raises(ValueError, match="summon_full_params"):
        soft_model.save_pretrained(place, is_main_process=first)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        soft_model.save_pretrained(place, is_main_process=first)
    return found


def save(soft_model: softkv.SoftModel, optimizer: torch.optim.Optimizer, folder: str) -> None:
    model, state = get_state_dict(soft_model, optimizer)
    checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder)


def resume(soft_model: softkv.SoftModel, optimizer: torch.optim.Optimizer, folder: str) -> None:
    model, state = get_state_dict(soft_model, optimizer)
    checkpoint.load({"model": model, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(soft_model, optimizer, model_state_dict=model, optim_state_dict=state)


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    hurry()
    dist.init_process_group("gloo")
    results = {}
    for strategy, method in RUNS:
        splits = TENSOR_PARALLEL in strategy  # heads, and not rows
        soft_model = attach_split(method, os.path.join(folder, "base")) if splits else attach(method)
        examples = rows(soft_model.method, 6)
        model, place = STRATEGIES[strategy](soft_model), os.path.join(folder, strategy, method)
        optimizer = optimizer_of(soft_model)
        share = (1, 0) if splits else (2, dist.get_rank())
        found = train(soft_model, model, optimizer, examples, *share)
        soft_model.save_pretrained(place, is_main_process=dist.get_rank() == 0)
        save(soft_model, optimizer, os.path.join(place, "state"))
        resume(soft_model, optimizer, os.path.join(folder, "one process", method, "state"))
        results[f"{strategy}: {method}"] = found + train(soft_model, model, optimizer, examples, *share)
    results |= {f"{FSDP1}: {method}": fsdp1_run(folder, method) for method in OF_FSDP1}
    split = {name: case(folder) for name, case in split_runs.CASES.items()}
    planned = planned_runs.measured(folder)
    if dist.get_rank() == 0:
        Path(folder, "planned.json").write_text(json.dumps(planned))
        Path(folder, "losses.json").write_text(json.dumps(results))
        Path(folder, "split.json").write_text(json.dumps(split))
    leave_together()


if __name__ == "__main__":
    main(sys.argv[1])
