"""Loading into and saving from modules sharded by FSDP2 or tensor parallelism. Every process must call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from softkv.methods.base import SoftPrompt
from softkv.methods.sharded import is_sharded_tensor, whole


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """Shard a full tensor like another one. If processes hold different values, those of the first are used."""
    if not is_sharded_tensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of full tensors into a module whose parameters may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: sharded_like(tensor, own.get(name)) for name, tensor in tensors.items()})


def gathered(soft: SoftPrompt) -> SoftPrompt:
    """A soft prompt with full parameters, from one whose parameters may be sharded.

    Raises:
        ValueError: if FSDP1 shards them, because only its wrapper around the model can gather them.
    """
    # FSDP1 flattens what it shards to one axis, and every soft prompt has a parameter with two or more.
    flattened = [each for each in soft.parameters() if getattr(each, "_fsdp_flattened", False)]
    if flattened and all(each.dim() < 2 for each in flattened):
        raise ValueError(
            "FSDP1 shards this soft prompt: save it in every process within "
            "FullyShardedDataParallel.summon_full_params(model, writeback=False), or use FSDP2 (fully_shard)"
        )
    if not flattened and not any(is_sharded_tensor(each) for each in soft.parameters()):
        return soft
    return copy.deepcopy(soft, {id(each): nn.Parameter(whole(each.detach()).clone()) for each in soft.parameters()})
