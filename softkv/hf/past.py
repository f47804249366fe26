"""Prefixes on bases that keep their own attention but read `past_key_values`. During a forward pass the decoder gets a
cache that returns the slots in front of each row's tokens; the real cache still contains tokens only.

Such a base treats slots as tokens in front of the row: ALiBi gives them distances, and windows count them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from softkv.hf import checkpointing
from softkv.hf.context import BlockInputs, SoftContext
from softkv.hf.generation.cache_state import past_length
from softkv.hf.layout import in_order, left_order, padded_in_front
from softkv.hf.unhooking import unhook


class PrefixedPast(Cache):
    """A cache for one forward pass: the slots of each row, followed by the tokens of the real cache.

    Slots are inserted between a row's left padding and its first real token, because some bases count columns.

    Attributes:
        tokens: the real cache, or None without one.
        mask: `[B, P + S]`, the visible columns, or None for all.
        blocks: the numbers of the attention blocks that have read the cache.
    """

    def __init__(
        self,
        decoder: nn.Module,
        tokens: Cache | None,
        context: SoftContext,
        mask: Tensor | None,
        shape: tuple[int, int],
    ) -> None:
        super().__init__(layers=[])
        self._decoder, self.tokens, self._context = decoder, tokens, context
        self.blocks: set[int] = set()
        self._slots, self.mask, self._order = 0, mask, None
        if context.layers is None:
            return
        (B, T), past = shape, past_length(tokens)
        slots = slots_of(context, B)
        self._slots = slots.shape[1]
        if mask is None and (context.lengths is not None or context.index is not None):
            mask = torch.ones(B, past + T, dtype=torch.long, device=slots.device)
        if mask is not None:
            filled, unfilled = mask[:, : past + T], mask[:, past + T :]  # of a static buffer
            real = torch.cat([slots.to(mask.device, mask.dtype), filled], 1)
            if padded_in_front(real):
                self._order = left_order(real)
                real = in_order(real, self._order)
            self.mask = torch.cat([real, unfilled], 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys `[B, G, P + S, D]` and values `[B, G, P + S, Dv]` of a block, including the new tokens."""
        self.blocks.add(layer_idx)
        key, value = key_states, value_states
        if self._context.capture is not None:
            self._context.capture.append(BlockInputs(self._decoder, key, value, None, True))
        if self.tokens is not None:
            key, value = self.tokens.update(key, value, layer_idx, *args, **kwargs)
        if self._context.layers is None:
            return key, value
        prefix = self._context.of_layer(layer_idx, len(key), key.dtype, key.device)
        index = prefix["prefix_index"]
        return self._in_front(prefix["prefix_k"], key, index), self._in_front(prefix["prefix_v"], value, index)

    def _in_front(self, slots: Tensor, tokens: Tensor, index: Tensor | None) -> Tensor:
        if index is not None:
            slots = slots[index.clamp(min=0)]
        both = torch.cat([slots.expand(len(tokens), -1, -1, -1), tokens], 2)
        if self._order is None:
            return both
        order = self._order.to(both.device)
        if order.shape[1] < both.shape[2]:  # the rest of a static buffer
            rest = torch.arange(order.shape[1], both.shape[2], device=order.device)
            order = torch.cat([order, rest.expand(len(order), -1)], 1)
        return both.gather(2, order[:, None, :, None].expand_as(both))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._slots + (0 if self.tokens is None else self.tokens.get_seq_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = (
            (query_length, 0) if self.tokens is None else self.tokens.get_mask_sizes(query_length, layer_idx)
        )
        return self._slots + length, offset

    @property
    def is_compileable(self) -> bool:
        return self.tokens is not None and self.tokens.is_compileable

    def restore_cache(self, output: Any, layers: int) -> Any:
        """The decoder's output with the real cache instead of this one.

        Raises:
            ValueError: if not all of `layers` attention blocks have read the prefix.
        """
        if len(self.blocks) < layers:
            raise ValueError(
                f"{type(self._decoder).__name__} passed its cache to only {len(self.blocks)} of {layers} attention "
                "blocks, and the others would ignore the prefix: call gradient_checkpointing_disable()"
            )
        if isinstance(output, tuple):
            return tuple(self.tokens if each is self else each for each in output if each is not self or self.tokens)
        return type(output)(**{name: self.tokens if each is self else each for name, each in output.items()})


def slots_of(context: SoftContext, rows: int) -> Tensor:
    """bool `[rows, P]`: the slots in use of each row."""
    assert context.layers is not None
    k = next(iter(context.layers.values()))[0]
    real, index = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device), context.index_of(rows)
    if context.lengths is not None:
        real = torch.arange(k.shape[2], device=k.device) < context.lengths[:, None]
    if index is not None:
        real = real[index.clamp(min=0)] & (index >= 0)[:, None]
    return real.expand(rows, -1)


def as_padding_mask(mask: Any) -> Any:
    """The padding mask `[B, S]` of a causal mask `[B, 1, T, S]`, as made for static caches: the columns
    visible to the last query. Other masks are returned unchanged."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return mask
    last = mask[:, 0, -1]
    return (last if last.dtype == torch.bool else last >= 0).long()


@dataclass(frozen=True)
class InPast:
    """Passes prefixes to a decoder in its `past_key_values`.

    Attributes:
        decoder: the base's decoder.
        causal: whether tokens see only earlier ones.
    """

    decoder: Any
    causal: bool

    @classmethod
    def of(cls, decoder: Any, causal: bool) -> InPast | None:
        """None if the decoder takes no cache, or its cache holds anything but the keys and values of all tokens."""
        if "past_key_values" not in inspect.signature(decoder.forward).parameters:
            return None
        held = DynamicCache(config=decoder.config).layers
        return cls(decoder, causal) if all(type(layer) is DynamicLayer for layer in held) else None

    def register(self, hooks: Any) -> None:
        """Hook the layers that support gradient checkpointing."""
        for module in self.decoder.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.register_forward_pre_hook(self._enter_layer, with_kwargs=True)

    def remove(self, hooks: Any) -> None:
        """Undo `register`. May be repeated."""
        unhook(self, self.decoder.modules())

    def enter(self, decoder: Any, context: SoftContext, kwargs: dict[str, Any]) -> None:
        """Replace the cache and mask in the keywords of the decoder's forward by those with the prefix."""
        embeds, mask, cache = (kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "past_key_values"))
        tokens = kwargs["input_ids"] if embeds is None else embeds
        recomputes = decoder.training and checkpointing.is_on(decoder)
        if recomputes and cache is not None:
            raise ValueError(
                "past_key_values expects no gradient checkpointing, which would add every token to the cache twice: "
                "leave the cache out"
            )
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", False)
        if cache is None and use_cache and self.causal and not recomputes:
            cache = DynamicCache(config=decoder.config)
        past = PrefixedPast(decoder, cache, context, mask, (tokens.shape[0], tokens.shape[1]))
        kwargs |= {"past_key_values": past, "attention_mask": past.mask}

    def _enter_layer(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keyword pre-hook of a checkpointed layer: passes the cache by position. transformers removes the keyword
        `past_key_values` from such layers, because recomputation would fill a cache twice; this one is only read."""
        if not (layer.training and layer.gradient_checkpointing):
            return None
        if not any(isinstance(each, PrefixedPast) for each in kwargs.values()):
            return None
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        return bound.args, bound.kwargs
