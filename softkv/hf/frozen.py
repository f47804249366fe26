"""A transformers model as the methods see it, and as it was before softkv touched it."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from softkv.hf.interface import NAME
from softkv.methods.base import BaseShape
from softkv.prefix import Prefix

_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_pdrop", "dropout")


class FrozenBase:
    """What a method may ask of the model that it steers (`softkv.methods.base.FrozenModel`).

    Args:
        model: the transformers model.
        blocks: keys `[1, G, 1, D]` that reached each attention block in a forward pass of one token, by layer.
        tokenizer: for text inits, or None.
    """

    def __init__(self, model: Any, blocks: dict[int, Tensor], tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        sizes = {(key.shape[1], key.shape[3]) for key in blocks.values()}
        kv_heads, head_dim = sizes.pop() if len(sizes) == 1 else (0, 0)
        rows, width = model.get_input_embeddings().weight.shape
        config = model.config.get_text_config()
        self.shape = BaseShape(len(blocks), kv_heads, head_dim, config.hidden_size, width, rows)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids.to(self.model.device))

    def prefix_of(self, ids: Tensor) -> Prefix:
        return Prefix.from_ids(self.model, ids[None].to(self.model.device))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                "an init from a text needs the tokenizer: softkv.attach(model, method, tokenizer=tokenizer)"
            )
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]


class Original:
    """A model's state before the first attach: restored when the last soft prompt is detached."""

    _of: WeakKeyDictionary[nn.Module, Original] = WeakKeyDictionary()

    def __init__(self, model: Any) -> None:
        self.implementation = model.config._attn_implementation
        self.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.dropouts: list[tuple[nn.Module, str, float]] = []
        self.holders = 0

    @classmethod
    def freeze(cls, model: Any) -> Original:
        """Freezes the model, turns its attention to softkv's and its attention dropout off; counts one holder."""
        original = cls._of.get(model)
        if original is None:
            original = cls(model)
            model.set_attn_implementation(NAME)
            if model.config._attn_implementation != NAME:
                raise ValueError(
                    f"{type(model).__name__} does not take its attention from transformers' attention interface, "
                    "so softkv can't reach it"
                )
            model.requires_grad_(False)
            cls._of[model] = original
        original.holders += 1
        return original

    def silence_dropout(self, blocks: list[nn.Module]) -> None:
        """Sets the attention dropout of the given attention modules to 0, with one warning."""
        found = [
            (holder, name, probability)
            for block in blocks
            for holder, name, probability in _attention_dropouts(block)
            if probability > 0
        ]
        for holder, name, _ in found:
            setattr(holder, name, 0.0)
        self.dropouts += found
        if found:
            warnings.warn(
                f"softkv sets the attention dropout of the frozen model to 0 (it was {found[0][2]})", stacklevel=3
            )

    def release(self, model: Any) -> None:
        """Gives up one hold; the last one restores the model exactly."""
        self.holders -= 1
        if self.holders:
            return
        del self._of[model]
        model.set_attn_implementation(self.implementation)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad[name])
        for holder, name, probability in self.dropouts:
            setattr(holder, name, probability)


def _attention_dropouts(block: nn.Module) -> list[tuple[nn.Module, str, float]]:
    found: list[tuple[nn.Module, str, float]] = []
    for name in _DROPOUTS:
        value = getattr(block, name, None)
        if isinstance(value, float):
            found.append((block, name, value))
        elif isinstance(value, nn.Dropout):
            found.append((value, "p", value.p))
    return found
