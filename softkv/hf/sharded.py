"""Tensors that are sharded over processes (`DTensor`), by FSDP2 or tensor parallelism. Every process must call."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from softkv.methods.base import SoftPrompt


def is_sharded_tensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, without importing its class, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """The full tensor, gathered if it is sharded."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor


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
        ValueError: if FSDP1 shards them, because its shards can't be assigned to parameters.
    """
    if any(getattr(each, "_fsdp_flattened", False) for each in soft.parameters()):
        raise ValueError("FSDP1 shards this soft prompt, which softkv can't gather: use FSDP2 (fully_shard)")
    if not any(is_sharded_tensor(each) for each in soft.parameters()):
        return soft
    other = copy.deepcopy(soft)
    for module in other.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(whole(parameter.detach())))
    return other
