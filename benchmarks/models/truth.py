"""Reference results without softkv: the bare model in fp32 with transformers' eager attention, one row at a time
without padding, soft tokens as embeddings in the row, a prefix in the cache or concatenated to the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from itertools import count, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from softkv.methods.base import SoftPrompt
from softkv.prefix import Prefix

from .rows import Row


def alone(bare: Any, soft: SoftPrompt, row: Row) -> Tensor:
    """Logits `[T, V]` of one row, aligned with its ids."""
    words = bare.get_input_embeddings()(torch.tensor(row.ids).clamp(min=0))
    tokens = soft.soft_tokens()
    if tokens is None:
        prefix = soft.prefix()
        assert prefix is not None
        return behind(bare, prefix, torch.tensor([row.ids])).logits[0]
    if soft.placement == "inline":
        words = torch.stack([tokens[-i - 1] if i < 0 else words[at] for at, i in enumerate(row.ids)])
        return bare(inputs_embeds=words[None]).logits[0]
    at = 0 if soft.placement == "before" else row.prompt
    logits = bare(inputs_embeds=torch.cat([words[:at], tokens, words[at:]])[None]).logits[0]
    return logits[[t + len(tokens) if t >= at - 1 else t for t in range(len(row.ids))]]


def behind(bare: Any, prefix: Prefix, ids: Tensor, stack: Any = None) -> Any:
    """The output for ids behind a cache that holds the prefix; of a model with a head that gives none to its `stack`,
    too."""
    from transformers import DynamicCache

    stack = bare if stack is None else stack
    filled = cache_of(stack, ids)
    cache = DynamicCache(config=bare.config)
    held = getattr(filled, "layers", [])
    layers = [number for number, layer in enumerate(held) if isinstance(getattr(layer, "keys", None), Tensor)]
    layers = [number for number in layers if filled.layers[number].keys.dim() == 4]
    P, T = prefix.length, ids.shape[1]
    if type(filled) is not DynamicCache or runs(bare, ids) not in (0, len(layers)):  # 0: not through the interface
        return concatenated(bare, prefix, ids)
    pairs = prefix.layers(len(layers))
    if any(held[number].keys.shape[1::2] != k.shape[1::2] for number, (k, _) in zip(layers, pairs, strict=True)):
        return concatenated(bare, prefix, ids)
    for number, (k, v) in zip(layers, pairs, strict=True):
        cache.update(k, v[..., : filled.layers[number].values.shape[-1]], number)
    inputs = {
        "attention_mask": torch.ones(1, P + T, dtype=torch.long),
        "position_ids": first(bare) + P + torch.arange(T)[None],
    }
    inputs = {name: value for name, value in inputs.items() if name in signature(stack.forward).parameters}
    given = {"past_key_values": cache, "use_cache": True, **inputs}
    hook = stack.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True)
    try:
        return bare(input_ids=ids)
    finally:
        hook.remove()


@torch.no_grad()
def cache_of(stack: Any, ids: Tensor) -> Any:
    """What a stack keeps of ids, or None."""
    if "past_key_values" not in signature(stack.forward).parameters:
        return None
    filled = stack(input_ids=ids, use_cache=True).get("past_key_values")
    return getattr(filled, "self_attention_cache", filled)


def first(bare: Any) -> int:
    """The position of a row's first token: RoBERTa's stands behind its padding's."""
    tables = [module for name, module in bare.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return padding[0] + 1 if padding else 0


@torch.no_grad()
def runs(bare: Any, ids: Tensor) -> int:
    """How many times a pass runs attention."""
    turns: list[int] = []

    def attend(eager: Any, module: Any, *args: Any, **options: Any) -> Any:
        turns.append(len(turns))
        return eager(module, *args, **options)

    if through_interface(bare):
        with_attention(bare, attend, input_ids=ids)
    return len(turns)


def through_interface(bare: Any) -> bool:
    """Whether a model knows transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(import_module(type(bare).__module__))


def concatenated(bare: Any, prefix: Prefix, ids: Tensor) -> Any:
    """The output for ids where each block's keys and values really stand behind the prefix's: of models that keep no
    cache, or whose caches hold something else (latents, keys that blocks share)."""
    turn = count(0)

    def attend(eager: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        at = next(turn) if len(prefix.k) > 1 else 0
        k, v = prefix.k[at], prefix.v[at][..., : value.shape[-1]]
        mask = mask if mask is None else F.pad(mask, (k.shape[2], 0))
        return eager(module, query, torch.cat([k, key], 2), torch.cat([v, value], 2), mask, **options)

    positions = first(bare) + prefix.length + torch.arange(ids.shape[1])[None]
    return with_attention(bare, attend, input_ids=ids, position_ids=positions)


class WrittenOut(TorchFunctionMode):
    """Attention that models write out themselves, with a prefix in front of the keys and values of each block: products
    with queries, a softmax, products with values. Slots have no position."""

    def __init__(self, prefix: Prefix, scale: float) -> None:
        super().__init__()
        self.layers = iter(prefix.layers(len(prefix.k)) if len(prefix.k) > 1 else repeat(prefix.layers(1)[0]))
        self.scale = scale
        self.query: Tensor | None = None
        self.slots: Tensor | None = None  # what they add to the next product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        done = func(*args, **(kwargs or {}))
        if func.__name__ in ("matmul", "bmm", "__matmul__"):
            if self.slots is not None:
                done, self.slots, self.query = done + self.slots.reshape(done.shape), None, None
            elif self.query is None:
                self.query = args[0]
        elif func.__name__ == "softmax":
            assert self.query is not None
            (k, v), T = next(self.layers), args[0].shape[-1]
            scores = self.query.reshape(*args[0].shape[:-1], -1) @ k.mT * self.scale
            weights = func(torch.cat([scores, args[0]], -1), *args[1:], **(kwargs or {}))
            done, self.slots = weights[..., -T:], weights[..., :-T] @ v
        return done


def written_out(bare: Any, prefix: Prefix, ids: Tensor) -> Any:
    """The output of an encoder that does not take its attention from transformers' interface."""
    terms = 1 + len(getattr(bare.config, "pos_att_type", None) or [])  # of DeBERTa's scores
    with WrittenOut(prefix, (prefix.layers(len(prefix.k))[0][0].shape[-1] * terms) ** -0.5):
        return bare(input_ids=ids, **positions_behind(bare, prefix, ids))


def positions_behind(bare: Any, prefix: Prefix, ids: Tensor) -> dict[str, Tensor]:
    """Positions of tokens behind a prefix, where the model takes any."""
    if "position_ids" not in signature(bare.forward).parameters:
        return {}
    return {"position_ids": first(bare) + prefix.length + torch.arange(ids.shape[1])[None]}


def with_attention(bare: Any, attend: Callable[..., Any], **inputs: Tensor) -> Any:
    """The output of a model whose blocks call `attend` with transformers' eager attention of theirs."""
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in signature(bare.forward).parameters else {}
    with attending(bare, attend):
        return bare(**inputs, **options)


@contextmanager
def attending(bare: Any, attend: Callable[..., Any]) -> Iterator[None]:
    """Blocks call `attend` with transformers' eager attention of theirs."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def with_eager(module: Any, *args: Any, **options: Any) -> Any:
        return attend(type(module).forward.__globals__["eager_attention_forward"], module, *args, **options)

    AttentionInterface.register("concatenated", with_eager)
    AttentionMaskInterface.register("concatenated", eager_mask)
    bare.set_attn_implementation("concatenated")
    try:
        yield
    finally:
        bare.set_attn_implementation("eager")
