"""PEFT's prefix for encoder-decoders, which acts in the self-attention of the decoder only.

PEFT's flat prefix has L pairs of K and V. `get_prompt` concatenates two copies of them and gives each layer four
matrices, of which its cache keeps the first two, so that layer i has pair 2i mod L. (The other two are meant for
cross-attention, whose cache PEFT empties.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softkv.methods.where import Site, where_of
from softkv.prefix import Prefix

DECODER: tuple[Site, ...] = ("decoder",)


def of_layers(pairs: Tensor) -> Tensor:
    """K or V of L layers `[L, 1, G, P, D]`, from the L pairs."""
    count = len(pairs)
    return pairs[torch.arange(count) * 2 % count].contiguous()


def in_pairs(prefix: Prefix, layers: int) -> Prefix:
    """The pairs for a prefix of the decoder's layers. Their number is odd, so that no layers share one; there may be
    more pairs than layers."""
    count = layers + 1 - layers % 2
    at = torch.arange(layers) * 2 % count
    k, v = (torch.stack(each).detach() for each in zip(*prefix.layers(layers), strict=True))
    pairs = (each.new_zeros(count, *each.shape[1:]).index_copy(0, at, each) for each in (k, v))
    return Prefix(next(pairs), next(pairs), window_covers=prefix.window_covers)


def of_decoder(method: Any, tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The tensors of PEFT's adapter; for a prefix of an encoder-decoder, those of the decoder's layers.

    PEFT counts the layers of the encoder.

    Raises:
        ValueError: if the decoder has more.
    """
    if where_of(method) != DECODER:
        return dict(tensors)
    if len(tensors["k"]) < layers:
        raise ValueError(
            f"this PEFT prefix has {len(tensors['k'])} layers, this model's decoder has {layers}, where PEFT fails "
            "too: it was trained on another base model"
        )
    return {name: tensor[:layers].contiguous() for name, tensor in tensors.items()}
