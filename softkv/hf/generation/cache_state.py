"""What the forward that filled a cache leaves with it, for those that go on from it.

It is an attribute of the cache, so that copies of the cache carry copies of it, and it follows the cache's own
operations on rows: beams, reordering, selection. Cropping only takes tokens that were read later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.hf.context import LayerKV
from softkv.hf.prefixes import Names, SoftRows

_ATTRIBUTE = "_softkv_filled"


@dataclass
class Filled:
    """
    Attributes:
        columns: T of the batch that filled the cache, in which masks of later forwards count.
        rows: B of it.
        adapters: the adapter of each of these rows, or the one of all of them.
        mask: `[B, T + k]`, the real tokens among the columns that the cache holds, soft tokens included.
        kv: encoder mode, the K/V `[A, G, P, D]` of each block.
        order: which row of that batch each row of the cache is, or None while they are the same.
        unread: columns of its prompts that a `generate` has still to read.
    """

    columns: int
    rows: int
    adapters: Names = ()
    mask: Tensor | None = None
    kv: dict[int, LayerKV] = field(default_factory=dict)
    order: Tensor | None = None
    unread: int = 0

    @staticmethod
    def of(cache: Any) -> Filled | None:
        """What was left with a cache."""
        return getattr(cache, _ATTRIBUTE, None)

    def leave_with(self, cache: Any) -> None:
        """Leaves this with a cache."""
        setattr(cache, _ATTRIBUTE, self)
        for name in _FOLLOWED:
            setattr(cache, name, MethodType(_following(name), cache))

    @classmethod
    def by(cls, soft: SoftRows, cache: Any) -> Filled:
        """What was left with a cache that rows with soft prompts go on from."""
        filled = cls.of(cache)
        if filled is None and soft.reading_prompts:
            raise ValueError(
                f"{soft.reading_prompts} needs a cache that this SoftModel has filled: got one with "
                f"{past_length(cache)} tokens in it that were read without the soft prompt"
            )
        return filled or cls(0, 0)

    @staticmethod
    def forget(cache: Any) -> None:
        """Takes from an emptied cache what was left with it."""
        for name in (_ATTRIBUTE, *_FOLLOWED):
            cache.__dict__.pop(name, None)

    @property
    def order_of_adapters(self) -> list[int] | None:
        """Which of `adapters` each row of the cache has, or None while they are in their order."""
        if self.order is None:
            return None
        return (self.order // (self.rows // len(self.adapters))).tolist()

    def check_same_rows(self, mask: Tensor) -> None:
        """Refuses a mask `[B, T]` of whole rows that puts what the cache holds into other columns."""
        front = mask[:, : self.columns].bool()
        rows = self.rows if self.order is None else len(self.order)
        if len(mask) != rows or front.shape[1] < self.columns:
            return
        same = front.all() if self.mask is None else (front == self._front(rows)[:, : self.columns].bool()).all()
        if not bool(same):
            raise ValueError(
                "generate goes on from a cache that holds these rows in other columns: expected ids padded as those "
                "that filled it (on the left), and nothing put between them"
            )

    def mask_of(self, mask: Tensor | None, k: int, shape: tuple[int, int]) -> Tensor | None:
        """The padding mask `[B, S]` of the cache and what is put behind it.

        Args:
            mask: `[B, S - k]` in the columns that were given, `[B, S]` where soft tokens are counted, or None.
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
    """Refuses real tokens among the last T columns of a mask `[B, S]` that follow padding behind real tokens."""
    if torch.compiler.is_compiling():
        return
    real = mask.bool()
    begun = real.cumsum(1) > 0
    gap = (begun & ~real).cumsum(1) > 0
    if bool((gap & real)[:, -T:].any()):
        raise ValueError(
            "padding lies between a row's tokens in the cache, and this model's sliding windows would count it: go on "
            "with rows that are padded on the left, or with tokens for every row"
        )


def past_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


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
    """The operation `name` of a cache, done to what was left with it too."""

    def operation(cache: Any, argument: Any) -> None:
        getattr(type(cache), name)(cache, argument)
        filled = Filled.of(cache)
        assert filled is not None
        if filled.order is None:
            device = argument.device if isinstance(argument, Tensor) else None
            filled.order = torch.arange(filled.rows, device=device)
        filled.order = _FOLLOWED[name](filled.order, argument)

    return operation
