"""Loading into and saving from modules that FSDP2 or tensor parallelism shards. Every process must call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from softkv.methods.base import SoftPrompt
from softkv.methods.sharded import is_sharded_tensor, whole


def as_held(tensor: Tensor, like: Any) -> Tensor:
    """A full tensor, sharded like another one; the first process's values are used if they differ."""
    if not is_sharded_tensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of full tensors into a module whose parameters may be sharded."""
    held = module.state_dict()
    module.load_state_dict({name: as_held(tensor, held.get(name)) for name, tensor in tensors.items()})


def gathered(soft: SoftPrompt) -> SoftPrompt:
    """A soft prompt with full parameters, from one whose parameters may be sharded.

    Raises:
        ValueError: when FSDP1 holds shards of them, which only the module around the model can gather.
    """
    # FSDP1 makes lines of what it shards, and every soft prompt has a matrix.
    held = [each for each in soft.parameters() if getattr(each, "_fsdp_flattened", False)]
    if held and all(each.dim() < 2 for each in held):
        raise ValueError(
            "FSDP1 shards this soft prompt: save it in every process within "
            "FullyShardedDataParallel.summon_full_params(model, writeback=False), or use FSDP2 (fully_shard)"
        )
    if not held and not any(is_sharded_tensor(each) for each in soft.parameters()):
        return soft
    return copy.deepcopy(soft, {id(each): nn.Parameter(whole(each.detach()).clone()) for each in soft.parameters()})
