"""Tensors that are sharded over processes (`DTensor`), as methods and models see them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_sharded_tensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`, without the second that importing its class takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, gathered where it is sharded: every process must call."""
    return tensor.full_tensor() if is_sharded_tensor(tensor) else tensor
