"""Older files, which store values as wide as keys even if Dv differs from D."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softkv.methods.base import BaseShape

_NETWORK = re.compile(r"mlps?(\.\d+)?\.2\.(weight|bias)")  # the last layer of an MLP that computes K and V


def with_narrow_values(config: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: BaseShape) -> dict[str, Tensor]:
    """The tensors of a file without the columns of values that attention never reads.

    Args:
        config: of the file; newer ones contain the `value_dim` of their base.
        tensors: of the soft prompt.
        shape: of the base, already checked against the file.
    """
    base, unread = config["base"], shape.head_dim - shape.value_dim
    if unread <= 0 or "value_dim" in base or "head_dim" not in base or config["method"] == "p-tuning":
        return dict(tensors)
    keys = shape.kv_heads * shape.head_dim
    found = {}
    for name, tensor in tensors.items():
        if name == "v" and tensor.shape[-1:] == (shape.head_dim,):
            tensor = tensor[..., : shape.value_dim]
        elif _NETWORK.fullmatch(name) and tensor.dim() and tensor.shape[0] % (2 * keys) == 0:
            k, v = tensor.unflatten(0, (-1, 2, shape.kv_heads, shape.head_dim)).unbind(1)
            tensor = torch.cat([k.flatten(1, 2), v[:, :, : shape.value_dim].flatten(1, 2)], 1).flatten(0, 1)
        found[name] = tensor.contiguous()
    return found
