"""A transformers model as methods see it, and its original state before `attach`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softkv.hf import checkpointing
from softkv.hf.attention import NAME
from softkv.hf.generation import processors
from softkv.hf.placement import device_of, free_to_pack, keep_differentiable
from softkv.hf.vocabulary import word_ids
from softkv.methods.base import BaseShape, layers_like
from softkv.prefix import Prefix

_ATTRIBUTE = "_softkv_base_state"
_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_pdrop", "dropout")


class UnsupportedAttention(ValueError):
    """Raised if softkv can't replace a model's attention."""


def decoder_of(model: Any) -> Any:
    """The stack of attention blocks inside a transformers model: its text decoder, or its encoder if it has no
    decoder."""
    found = model.get_decoder()  # found by attribute names; ModernBERT's output layer is called "decoder"
    return found if isinstance(found, PreTrainedModel) else model.base_model


class FrozenBase:
    """The `softkv.methods.base.FrozenModel` of a transformers model.

    Args:
        model: the transformers model.
        widths: (G, D, Dv) of each attention block.
        tokenizer: for text inits, or None.
        reads: the block whose keys and values each block reads; empty where each has its own.
    """

    def __init__(
        self, model: Any, widths: Sequence[tuple[int, int, int]], tokenizer: Any = None, reads: tuple[int, ...] = ()
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        rows, width = model.get_input_embeddings().weight.shape
        config = model.config.get_text_config()
        self.shape = BaseShape(
            hidden_size=config.hidden_size, embedding_size=width, vocab_size=rows, reads=reads, **layers_like(widths)
        )

    def with_tokenizer(self, tokenizer: Any) -> FrozenBase:
        """The same model with another tokenizer."""
        other = copy.copy(self)
        other.tokenizer = tokenizer
        return other

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        self._check_values()
        return self.model.get_input_embeddings()(ids.to(device_of(self.model)))

    def prefix_of(self, ids: Tensor, *, standing_in: bool = True) -> Prefix:
        self._check_values()
        return Prefix.from_ids(self.model, ids[None].to(device_of(self.model)), standing_in=standing_in)

    def words(self) -> Tensor:
        return word_ids(self.model, self.tokenizer)

    def _check_values(self) -> None:
        if device_of(self.model).type == "meta":
            raise ValueError(
                'this soft prompt starts from the base\'s values, which a base on "meta" does not have: expected '
                "PTuningV2 or PrefixTuning with init_std=0.1 (random values), or softkv.load of a saved adapter"
            )

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("an init from a text needs the tokenizer: give tokenizer=... with the method")
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]


class BaseState:
    """A model's state before the first attach: restored when the last soft prompt is detached.

    It is stored on the model, so that it is copied with the model.
    """

    def __init__(self, model: Any) -> None:
        self.quantised = keep_differentiable(model)  # may replace parameters
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs = {id(module.config): module.config for module in models}  # outer models before inner ones
        self.implementations = [(config, config._attn_implementation) for config in configs.values()]
        self.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.checkpointing = checkpointing.is_on(model)
        self.dropouts: list[tuple[nn.Module, str, float]] = []
        self.holders: list[Any] = []
        self.out_of_reach: str | None = None

    @classmethod
    def freeze(cls, model: Any, holder: Any) -> BaseState:
        """Freeze the model and switch its attention to softkv's, until every holder has released it.

        Raises:
            UnsupportedAttention: if the model does not use transformers' attention interface, or keeps its own. Its
                state is recorded all the same.
        """
        state = model.__dict__.get(_ATTRIBUTE)
        if state is None:
            state = cls(model)
            setattr(model, _ATTRIBUTE, state)
            if decoder_of(model)._can_set_attn_implementation():
                model.set_attn_implementation(NAME)
            model.requires_grad_(False)
        state.holders.append(holder)
        if state.out_of_reach is not None:
            raise UnsupportedAttention(state.out_of_reach)
        if decoder_of(model).config._attn_implementation != NAME:
            raise UnsupportedAttention(
                f"{type(model).__name__} does not use transformers' attention interface, "
                "so softkv can't replace its attention"
            )
        return state

    @staticmethod
    def of(model: Any) -> BaseState:
        """The state of a model to which soft prompts are attached."""
        state: BaseState = model.__dict__[_ATTRIBUTE]
        return state

    @staticmethod
    def keep_own_attention(model: Any, reason: UnsupportedAttention) -> None:
        """Restore the own attention of a frozen model until it is released.

        Raises:
            UnsupportedAttention: with the reason, if other holders of the model need softkv's attention.
        """
        state = BaseState.of(model)
        if state.out_of_reach is None and len(state.holders) > 1:
            raise reason
        state.out_of_reach = str(reason)
        state._restore_attention()

    @staticmethod
    def release(model: Any, holder: Any) -> None:
        """Release a hold; releasing the last one restores the model exactly. May be repeated, for example after an
        interrupt."""
        state = model.__dict__.get(_ATTRIBUTE)
        if state is None:
            return
        state.holders = [each for each in state.holders if each is not holder]
        if not state.holders:
            state._restore(model)
            delattr(model, _ATTRIBUTE)

    def silence_dropout(self, blocks: Iterable[nn.Module]) -> None:
        """Set the attention dropout of the given attention modules to 0, with one warning."""
        found = [
            (holder, name, probability)
            for block in blocks
            for holder, name, probability in _attention_dropouts(block)
            if probability > 0
        ]
        self.dropouts += found
        for holder, name, _ in found:
            setattr(holder, name, 0.0)
        if found:
            warnings.warn(
                f"softkv sets the attention dropout of the frozen model to 0 (it was {found[0][2]})", stacklevel=5
            )

    def _restore_attention(self) -> None:
        for config, implementation in self.implementations:
            config._attn_implementation = implementation

    def _restore(self, model: Any) -> None:
        processors.uninstall(model)
        free_to_pack(self.quantised)
        self._restore_attention()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        for holder, name, probability in self.dropouts:
            setattr(holder, name, probability)
        if checkpointing.is_on(model) and not self.checkpointing:
            checkpointing.disable(model)
        for name, module in model.named_modules():
            module.training = self.training.get(name, module.training)


def detach_others(model: Any, held: list[Any]) -> None:
    """Detach what was attached after `holders_of` was read, because an interrupt may come between the end of an attach
    and the assignment of its result."""
    for holder in holders_of(model):
        if not any(holder is each for each in held):
            holder.remove()
            BaseState.release(model, holder)


def holders_of(model: Any) -> list[Any]:
    state = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    return [] if state is None else list(state.holders)


def _attention_dropouts(block: nn.Module) -> list[tuple[nn.Module, str, float]]:
    found: list[tuple[nn.Module, str, float]] = []
    for name in _DROPOUTS:
        value = getattr(block, name, None)
        if isinstance(value, float):
            found.append((block, name, value))
        elif isinstance(value, nn.Dropout):
            found.append((value, "p", value.p))
    return found
