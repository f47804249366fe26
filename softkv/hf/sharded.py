"""Tensors that are sharded over processes (`DTensor`), by FSDP2 or tensor parallelism. Every process must call."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_sharded_tensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, without the second that importing its class takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered where it is sharded."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor


def as_held(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, sharded as another one is; the first process's where they differ."""
    if not is_sharded_tensor(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a module whose parameters may be sharded."""
    held = module.state_dict()
    module.load_state_dict({name: as_held(tensor, held.get(name)) for name, tensor in tensors.items()})
