"""Packed prefill: padded prompts run without padding, and the base's layout is restored afterwards.

Batches of prompts of different lengths contain much padding. The decoder runs on the real tokens only, as in training;
afterwards padding is restored in its cache and output (zeros that no query sees).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from softkv.hf.context import PackedRows

# Supported arguments of a forward: others might have a column per token, or request outputs of each layer.
_UNDERSTOOD = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict",
    "softkv_prefix",
}  # fmt: skip


@dataclass(frozen=True)
class PackedPrefill:
    """The columns `[B, T]` of real tokens in a padded batch."""

    real: Tensor

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> PackedPrefill | None:
        """From a forward of the decoder, if its padding can be removed; else None."""
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        given = {name for name, value in kwargs.items() if value is not None and value is not False}
        if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.dim() != 2 or given - _UNDERSTOOD:
            return None
        positions = kwargs.get("position_ids")
        if positions is not None and positions.dim() != 2:  # of images too
            return None
        if cache is not None and (cache.get_seq_length() or not _grows_by_token(cache)):
            return None
        tokens = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        real = mask.bool()
        if mask.shape != tokens.shape[:2] or len(mask) == 1 or bool(real.all()) or not bool(real.any()):
            return None
        return cls(real)

    def rows(self) -> PackedRows:
        return PackedRows.from_lengths(self.real.sum(1))

    def pack(self, kwargs: dict[str, Any]) -> None:
        """The arguments of the decoder for the packed real tokens; positions `[B, T]` are among them."""
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].expand(*self.real.shape, *kwargs[name].shape[2:])[self.real][None]
        kwargs["attention_mask"] = None

    def unpack(self, output: Any, cache: Any) -> Any:
        """Restore padding in the decoder's output and in the cache."""
        for layer in cache.layers if cache is not None else ():
            layer.keys, layer.values = (
                self._padded(x.transpose(1, 2)).transpose(1, 2) for x in (layer.keys, layer.values)
            )
        output.last_hidden_state = self._padded(output.last_hidden_state)
        return output

    def _padded(self, line: Tensor) -> Tensor:
        """`[1, N, ...]` → `[B, T, ...]`"""
        padded = line.new_zeros(*self.real.shape, *line.shape[2:])
        padded[self.real] = line[0]
        return padded


def _grows_by_token(cache: Any) -> bool:
    """Whether every layer of the cache stores the keys of all tokens and nothing else: no windows, buffers or
    states."""
    kinds: list[Any] = [type(layer) for layer in cache.layers] or [getattr(cache, "layer_class_to_replicate", None)]
    return all(kind is DynamicLayer for kind in kinds)
