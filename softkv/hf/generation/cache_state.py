"""Per-cache state recorded at prefill and reused by later calls.

It is an attribute of the cache, so that it is copied with the cache, and it follows the cache's operations on rows:
beams, reordering, selection. Cropping only removes tokens that were read later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.hf.context import LayerKV, SoftContext
from softkv.hf.prefixes import Names, SoftRows
from softkv.prefix import Prefix

_ATTRIBUTE = "_softkv_state"


class Source(NamedTuple):
    """Identifies the memory of a prefix: parameters may be replaced instead of updated in place."""

    k: Tensor
    v: Tensor
    lengths: Tensor | None
    window_covers: bool
    at: tuple[Any, ...]

    @classmethod
    def of(cls, prefix: Prefix) -> Source:
        assert isinstance(prefix.k, Tensor)
        assert isinstance(prefix.v, Tensor)
        return cls(prefix.k, prefix.v, prefix.lengths, prefix.window_covers, _memory(prefix))

    def still(self, prefix: Prefix) -> bool:
        same = prefix.k is self.k and prefix.v is self.v and prefix.lengths is self.lengths
        return same and prefix.window_covers == self.window_covers and _memory(prefix) == self.at


def _memory(prefix: Prefix) -> tuple[Any, ...]:
    k, v = prefix.k, prefix.v
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    return k.data_ptr(), v.data_ptr(), k.shape, v.shape, k.stride(), v.stride()


class ReadContext(NamedTuple):
    """The context of a forward pass without gradients, and its inputs."""

    context: SoftContext
    soft: SoftRows
    sources: dict[str, Source]

    def made_of(self, soft: SoftRows, prefixes: dict[str, Prefix], backend: str | None) -> bool:
        """Whether the context was made from these soft prompts and prefixes."""
        if soft != self.soft or backend != self.context.backend or prefixes.keys() != self.sources.keys():
            return False
        return all(source.still(prefixes[name]) for name, source in self.sources.items())


@dataclass
class CacheState:
    """The state recorded when a cache was filled.

    Attributes:
        columns: T of the batch that filled the cache, to which masks of later forwards refer.
        rows: B of that batch.
        adapters: the adapter of each of these rows, or a single one for all.
        mask: `[B, T + k]`, the real tokens among the cache's columns, including soft tokens.
        kv: encoder mode, the K/V `[A, G, P, D or Dv]` of each block.
        order: which row of that batch each row of the cache is, or None while they are the same.
        unread: the number of prompt columns that a `generate` has not yet read.
        steps: the function that each block runs in a decoding step, by block number (`softkv.hf.repeat`).
        prefixes: prefixes computed without gradients for these rows, by adapter.
        context: of the last forward without gradients.
    """

    columns: int
    rows: int
    adapters: Names = ()
    mask: Tensor | None = None
    kv: dict[int, LayerKV] = field(default_factory=dict)
    order: Tensor | None = None
    unread: int = 0
    prefixes: dict[str, Prefix] = field(default_factory=dict)
    context: ReadContext | None = None
    steps: dict[int, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheState:
        """Copies of a cache share what is never changed."""
        return replace(self, mask=copy.deepcopy(self.mask, memo), kv=copy.deepcopy(self.kv, memo))

    @staticmethod
    def of(cache: Any) -> CacheState | None:
        """The state of a cache, or None."""
        return getattr(cache, _ATTRIBUTE, None)

    def store_on(self, cache: Any) -> None:
        """Store this as the state of a cache."""
        setattr(cache, _ATTRIBUTE, self)
        for name in _FOLLOWED:
            setattr(cache, name, partial(_following(name), cache))

    @classmethod
    def required(cls, soft: SoftRows, cache: Any) -> CacheState:
        """The state of a filled cache from which rows with soft prompts continue.

        Raises:
            ValueError: if there is none and a method needs it.
        """
        state = cls.of(cache)
        if state is None and soft.reading_prompts:
            raise ValueError(
                f"{soft.reading_prompts} needs a cache that this SoftModel has filled: got one with "
                f"{past_length(cache)} tokens that were read without the soft prompt"
            )
        return state or cls(0, 0)

    @staticmethod
    def clear(cache: Any) -> None:
        """Remove the state from an emptied cache."""
        for name in (_ATTRIBUTE, *_FOLLOWED):
            cache.__dict__.pop(name, None)

    @property
    def order_of_adapters(self) -> list[int] | None:
        """The index in `adapters` of each row of the cache, or None while they are in order."""
        if self.order is None:
            return None
        return (self.order // (self.rows // len(self.adapters))).tolist()

    def check_same_rows(self, mask: Tensor) -> None:
        """Refuse a mask `[B, T]` of whole rows in which the cache's tokens are in other columns."""
        front = mask[:, : self.columns].bool()
        rows = self.rows if self.order is None else len(self.order)
        if len(mask) != rows or front.shape[1] < self.columns:
            return
        same = front.all() if self.mask is None else (front == self._front(rows)[:, : self.columns].bool()).all()
        if not bool(same):
            raise ValueError(
                "generate continues a cache that has these rows in other columns: expected ids padded like those "
                "that filled it (on the left), with nothing inserted between them"
            )

    def mask_of(self, mask: Tensor | None, k: int, shape: tuple[int, int]) -> Tensor | None:
        """The padding mask `[B, S]` of the cache and the tokens after it.

        Args:
            mask: `[B, S - k]` without columns for soft tokens, `[B, S]` with them, or None.
            k: soft tokens in each row of the cache.
            shape: (B, S).
        """
        if mask is None:
            if self.mask is None:
                return None
            return F.pad(self._front(shape[0]), (0, shape[1] - self.mask.shape[1]), value=1)
        given = self.columns + (k if mask.shape[1] == shape[1] else 0)
        if self.mask is not None:
            front = self._front(len(mask)).to(mask.dtype)
        elif k:
            front = mask.new_ones(len(mask), self.columns + k)
        else:
            return mask
        return torch.cat([front, mask[:, given:]], 1)

    def _front(self, rows: int) -> Tensor:
        assert self.mask is not None
        mask = self.mask if self.order is None else self.mask[self.order]
        return mask.repeat_interleave(rows // len(mask), 0)


def check_contiguous(mask: Tensor, T: int) -> None:
    """Refuse a mask `[B, S]` in which padding separates the last T columns from earlier real tokens."""
    if torch.compiler.is_compiling():
        return
    real = mask.bool()
    begun = real.cumsum(1) > 0
    gap = (begun & ~real).cumsum(1) > 0
    if bool((gap & real)[:, -T:].any()):
        raise ValueError(
            "padding lies between a row's tokens in the cache, and this model's attention would count it (by sliding "
            "windows, or in its own way): continue with left-padded rows, or with tokens for every row"
        )


def past_length(cache: Any) -> int:
    """The number of tokens in a cache."""
    return 0 if cache is None else int(cache.get_seq_length())


def buffer_length(cache: Any, tokens: int) -> tuple[int, ...]:
    """The columns of a static cache's buffers; () if a cache has none large enough."""
    lengths = [getattr(layer, "max_cache_len", None) for layer in getattr(cache, "layers", ())]
    known = [length for length in lengths if length is not None]
    return (max(known),) if known and max(known) >= tokens else ()


def _rows_reordered(order: Tensor, rows: Tensor) -> Tensor:
    return order[rows.to(order.device)]


def _rows_repeated(order: Tensor, repeats: int) -> Tensor:
    return order.repeat_interleave(repeats)


_FOLLOWED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": _rows_reordered,
    "batch_select_indices": _rows_reordered,
    "batch_repeat_interleave": _rows_repeated,
}


def _following(name: str) -> Callable[[Any, Any], None]:
    """The operation `name` of a cache, applied to its state too."""

    def operation(cache: Any, argument: Any) -> None:
        getattr(type(cache), name)(cache, argument)
        state = CacheState.of(cache)
        assert state is not None
        if state.order is None:
            device = argument.device if isinstance(argument, Tensor) else None
            state.order = torch.arange(state.rows, device=device)
        state.order = _FOLLOWED[name](state.order, argument)

    return operation
