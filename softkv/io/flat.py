"""The layout in which PEFT and the P-tuning v2 repository store the K/V of a prefix: one row per slot.

[P, 2·L·G·D], seen as [P, 2L, G, D]: row 2l is K, row 2l + 1 is V of layer l
"""

from __future__ import annotations

import torch
from torch import Tensor

from softkv.prefix import Prefix

FLAT = "flat"  # the name of a flat prefix, which can only be split with the sizes of the base


def unflatten(flat: Tensor, layers: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """K and V `[L, 1, G, P, D]` of a flat prefix `[P, 2·L·G·D]`.

    Raises:
        ValueError: if its width is different.
    """
    width = 2 * layers * kv_heads * head_dim
    if flat.dim() != 2 or not len(flat) or flat.shape[1] != width:
        raise ValueError(
            f"expected a prefix of shape [P, {width}] for {layers} layers, {kv_heads} key/value heads of {head_dim}, "
            f"got {tuple(flat.shape)}"
        )
    kv = flat.reshape(len(flat), layers, 2, kv_heads, head_dim).permute(2, 1, 3, 0, 4)[:, :, None]
    return kv[0].contiguous(), kv[1].contiguous()


def flatten(prefix: Prefix, layers: int) -> Tensor:
    """The flat form `[P, 2·L·G·D]` of a prefix with A = 1; one pair for all layers is repeated."""
    kv = torch.stack([torch.stack(layer) for layer in prefix.layers(layers)])  # [L, 2, 1, G, P, D]
    return kv[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1).contiguous()
