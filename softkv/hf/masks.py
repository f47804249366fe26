"""transformers' mask contract: `key_state`, which `AttentionMaskInterface` calls once per forward pass, and how
attention reads it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)

from softkv.hf import call_scope
from softkv.hf.context import SoftContext
from softkv.hf.key_state import KeyState, UnpaddedMask


class Pattern(IntEnum):
    """Which keys a query sees, apart from those that a key state hides. The numbers are unusual axis sizes, so that a
    model with its own attention can't add a key state to its scores unnoticed."""

    CAUSAL = 11
    WINDOWED = 13  # causal, the last `sliding_window` keys
    CHUNKED = 17  # causal, within `attention_chunk_size` keys
    FULL = 19
    LOCAL = 23  # bidirectional, within `sliding_window` keys on either side


_BIDIRECTIONAL = (Pattern.FULL, Pattern.LOCAL)

# Codes of a key state in int8. A static cache passes its whole buffer, so a key may not exist yet; a padding key exists
# and has a position, but is hidden.
HIDDEN, SEEN = 1, 2


def key_state(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Which keys exist and which are visible, in the most compact form, identified by the dtype:

    - int8 `[1, pattern, rows, 0]`: all exist and are visible.
    - int32 `[1, pattern, rows, 1]`: the number of keys that exist; these are visible.
    - int8 `[B, pattern, rows, S]`: 0 does not exist, 1 exists but is hidden, 2 is visible.
    - int64 `[B, chunked, rows, S]`: the position of each key in its row, negative if it is hidden, the minimum if it
      does not exist. Chunks are counted from a row's first token, which a cache may have dropped.
    - bool `[B, 1, T, S]`: the keys that each query sees, if a model adds its own mask (blocks of an image).

    `pattern` is a `Pattern`; `rows` is 2 for packed rows, which position ids describe. It has four axes because
    transformers passes such masks through `generate`, compiled decoding and checkpointing unchanged.

    Raises:
        ValueError: if the model bypasses transformers' attention interface, and would not understand the result.
    """
    _check_interface(config)
    pattern, packed = _pattern(mask_function, use_vmap, local_size, config, kwargs)
    if torch.compiler.is_compiling() and attention_mask is not None:  # transformers packs rows only without a mask
        packed = False
    cut = pattern is Pattern.LOCAL and q_length != kv_length
    if packed and torch.compiler.is_compiling():
        # A tracer can't tell, but a SoftModel may know its rows, and padded or cached rows are never packed.
        call = call_scope.current()
        packed = (call is None or call.may_be_packed) and attention_mask is None and q_length == kv_length
        cut = cut or packed
    if pattern is None or cut or (packed and batch_size > 1):
        if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
            _check_not_counted()
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
    # Compilers trace masks of decoding steps, and would keep the guard; a prefill has already run.
    guarded = not torch.compiler.is_compiling() and (q_length > 1 or kwargs.get("allow_is_causal_skip", True))
    rows = 1 + packed
    end = kv_length if pattern in _BIDIRECTIONAL else q_offset + q_length - kv_offset
    part_filled = isinstance(end, Tensor) or end != kv_length
    if pattern is Pattern.CHUNKED and not (isinstance(kv_offset, int) and kv_offset == 0):
        at = _positions(attention_mask, kv_offset, kv_length, end, torch.device(device))
        return _made(at[:, None, None].expand(-1, pattern, rows, -1), guarded)
    seen = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    if seen is None and part_filled:
        count = torch.as_tensor(end, dtype=torch.int32, device=device).view(1, 1, 1, 1)
        return _made(count.expand(1, pattern, rows, 1), guarded)
    if seen is None or (not part_filled and _all_real(seen)):
        # Where packed rows may have to be told apart, what is found of them is kept on the state of a pass; chunks
        # begin to cut with the number of keys.
        lasts = pattern is not Pattern.CHUNKED and (q_length == 1 or (not packed and call_scope.current() is not None))
        if not lasts or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return _made(torch.empty(1, pattern, rows, 0, dtype=torch.int8, device=device), guarded)
        return _all_seen(pattern, rows, torch.device(device), guarded)
    exists = (torch.arange(kv_length, device=device) < end).view(1, -1)
    seen = exists & F.pad(seen, (0, kv_length - seen.shape[1]))
    state = exists.to(torch.int8) + seen.to(torch.int8)
    return _made(state[:, None, None, :].expand(-1, pattern, rows, -1), guarded)


def _check_not_counted() -> None:
    """Raise if chunks count the slots of a prefix: a mask matrix, made before attention is called, can't include
    them."""
    context = getattr(call_scope.current(), "context", None)
    if isinstance(context, SoftContext) and context.window_covers is not False:
        raise ValueError(
            "chunks that count the slots of a prefix expect no position_ids in compiled calls, and one line of packed "
            "rows in others: leave position_ids out, or give padded rows"
        )


_NOWHERE = -(2**31)  # the position of a key that does not exist yet


def _positions(
    mask: Tensor | None, offset: int | Tensor, length: int, end: int | Tensor, device: torch.device
) -> Tensor:
    """int64 `[B or 1, S]`, the positions of keys in their rows, in the form of a key state.

    Args:
        mask: `[B, columns]`, the real tokens, including those that a cache has dropped; None for all.
        offset: the column of the first key.
        length: S.
        end: the number of keys that exist.
    """
    at = torch.arange(length, device=device)
    column = (at + offset)[None]
    if mask is None:
        return torch.where(at < end, column, _NOWHERE)
    before = (mask.cumsum(1) == 0).sum(1)[:, None]  # padding in front of a row
    seen = mask.gather(1, column.clamp(max=mask.shape[1] - 1).expand(len(mask), -1)).bool()
    return torch.where(at < end, torch.where(seen, column - before, -1), _NOWHERE)


@cache
def _all_seen(pattern: Pattern, rows: int, device: torch.device, guarded: bool) -> Tensor:
    with torch.inference_mode(False):
        state = _made(torch.empty(1, pattern, rows, 0, dtype=torch.int8, device=device), guarded)
    _constant.add(id(state))
    return state


_constant: set[int] = set()


def is_constant(state: Tensor | None) -> bool:
    """Whether a key state is the shared one for passes of its pattern in which every key is visible."""
    return state is None or id(state) in _constant


def _made(state: Tensor, guarded: bool) -> Tensor:
    return state.as_subclass(KeyState) if guarded else state


def state_of_rows(line: Tensor | None, real: Tensor | None) -> Tensor | None:
    """The key state of rows that the model sees as one sequence without padding.

    Args:
        line: the key state of that sequence.
        real: `[B, T]`, the real tokens of the rows, or None for all.
    """
    keys = Keys.of(line, 1)
    if keys.pattern is None:
        return real if real is None else real.bool()
    if real is None:
        return cast(Tensor, line)[:, :, :1, :0]
    state = real.bool().to(torch.int8) + HIDDEN
    return _made(state[:, None, None, :].expand(-1, keys.pattern, 1, -1), not torch.compiler.is_compiling())


def _pattern(
    mask_function: Any, use_vmap: bool, local_size: int | None, config: Any, kwargs: dict[str, Any]
) -> tuple[Pattern | None, bool]:
    """The pattern of a mask function of transformers (None: unknown), and whether it separates packed rows."""
    # Compared by identity and "==", because in a compiled frame `in` misses a name in a tuple of names.
    known = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if use_vmap or not (known or mask_function.__qualname__ == _INTERSECTION):
        return None, False
    bidirectional = "allow_is_bidirectional_skip" in kwargs
    packed = _keeps_rows_apart(mask_function)
    if local_size is None:
        return Pattern.FULL if bidirectional else Pattern.CAUSAL, packed
    sizes = [getattr(config, size, None) for size in ("sliding_window", "attention_chunk_size")]
    if sizes.count(local_size) != 1:
        return None, False
    if bidirectional:
        return Pattern.LOCAL, packed
    return Pattern.WINDOWED if sizes[0] == local_size else Pattern.CHUNKED, packed


def _keeps_rows_apart(mask_function: Any) -> bool:
    name = mask_function.__qualname__
    if name != _INTERSECTION:
        return name == _ROWS_APART
    if torch.compiler.is_compiling():  # a tracer can't read closures
        return True
    return any(map(_keeps_rows_apart, mask_function.__closure__[0].cell_contents))


_INTERSECTION = and_masks().__qualname__
_ROWS_APART = packed_sequence_mask_function(torch.empty(0)).__qualname__


_reached: set[type] = set()


def _check_interface(config: Any) -> None:
    """transformers' models import its attention interface by one name; those that don't have attention of their own."""
    if not torch.compiler.is_compiling() and type(config) in _reached:
        return
    name = type(config).__module__.replace("configuration_", "modeling_")
    modeling = sys.modules.get(name)
    if modeling is not None and name != type(config).__module__ and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"{type(config).__name__.removesuffix('Config')} models do not use transformers' "
            'attention interface, so softkv can\'t replace it: use attn_implementation="eager"'
        )
    if modeling is not None and not torch.compiler.is_compiling():
        _reached.add(type(config))


def _all_real(mask: Tensor) -> bool:
    if isinstance(mask, UnpaddedMask):
        return True
    return mask.device.type != "meta" and not torch.compiler.is_compiling() and bool(mask.all())


class Keys(NamedTuple):
    """The keys according to a mask: a key state, a 2-D padding mask, or a matrix of what each query sees.

    Attributes:
        pattern: None if the mask does not determine it.
        packed: whether packed rows are separated.
        mask: `[B, S]`, the visible keys, or None for all.
        lengths: `[B]`, the number of keys that exist, or None for all.
        at: `[B or 1, S]`, the position of each key in its row if a cache may have dropped keys; else None.
        allowed: `[B or 1, H or 1, T or 1, S]`, the keys that each query sees: bool, or additive on the scores.
    """

    pattern: Pattern | None = None
    packed: bool = False
    mask: Tensor | None = None
    lengths: Tensor | None = None
    allowed: Tensor | None = None
    at: Tensor | None = None

    @classmethod
    def of(cls, state: Tensor | None, batch: int) -> Keys:
        if state is None:
            return cls()
        if isinstance(state, KeyState):
            state = state.bare
        if state.dim() == 2:
            return cls(mask=state.bool().expand(batch, -1))
        if state.dim() != 4:
            raise ValueError(f"softkv attention expects a mask of 2 or 4 axes, got the shape {tuple(state.shape)}")
        if state.dtype == torch.bool or state.is_floating_point():
            return cls(allowed=state)
        pattern, packed = Pattern(state.shape[1]), state.shape[2] == 2
        state = state[:, 0, 0]
        if not state.shape[1]:
            return cls(pattern, packed)
        if state.dtype == torch.int64:
            exists = (state > _NOWHERE).sum(-1, dtype=torch.int32).expand(batch)
            return cls(pattern, packed, (state >= 0).expand(batch, -1), exists, at=state)
        if state.dtype == torch.int32:
            return cls(pattern, packed, lengths=state[:, 0].expand(batch))
        exists = (state >= HIDDEN).sum(-1, dtype=torch.int32).expand(batch)
        return cls(pattern, packed, (state == SEEN).expand(batch, -1), None if pattern in _BIDIRECTIONAL else exists)

    def may_be_packed(self, cu_seqlens: Tensor | None) -> bool:
        """Whether position ids that restart mean packed rows, as for flash attention. An encoder's may restart with a
        row's second part."""
        all_seen = self.mask is None and self.lengths is None and self.allowed is None
        return all_seen and (self.pattern not in _BIDIRECTIONAL or cu_seqlens is not None)

    @property
    def causal(self) -> bool | None:
        """None if the mask does not determine it."""
        return None if self.pattern is None else self.pattern not in _BIDIRECTIONAL

    def positions(self, rows: int, keys: int, device: torch.device) -> Tensor:
        """`[rows, keys]`: the position of each key, counted from the first visible one of its row."""
        if self.at is not None:
            return self.at.expand(rows, -1)
        at = torch.arange(keys, device=device).expand(rows, -1)
        return at if self.mask is None else at - self.mask.int().argmax(1)[:, None]

    def matrix(self, causal: bool, window: int | None, queries: int, keys: Tensor) -> Tensor:
        """bool `[B or 1, 1, T, S]`: which keys `[B, G, S, D]` each of T queries sees."""
        at = torch.arange(keys.shape[2], device=keys.device)
        end = at.new_tensor([len(at)]) if self.lengths is None else self.lengths
        query = end[:, None, None] - queries + torch.arange(queries, device=at.device)[:, None]  # [B or 1, T, 1]
        sees = at < end[:, None, None].expand(-1, queries, 1)
        if causal:
            sees = sees & (at <= query)
        if window is not None:
            sees = sees & (at > query - window) & (at < query + window)
        if self.mask is not None:
            sees = sees & self.mask[:, None]
        return sees[:, None]


def padding_mask(mask: Any) -> Tensor | None:
    """`[B, S]`, the visible keys, from what a model passes to its decoder as attention mask: one mask, or one per kind
    of layer (wrapped models create them outside). None if it hides no key.

    Raises:
        ValueError: for a mask with a query axis.
    """
    if isinstance(mask, dict):
        found = [padding_mask(each) for each in mask.values() if each is not None]
        return max((each for each in found if each is not None), key=lambda each: each.shape[1], default=None)
    if mask is None or mask.dim() == 2:
        return mask
    keys = Keys.of(mask, len(mask))
    if keys.allowed is not None:
        if mask.dtype != torch.bool:
            raise ValueError(
                "softkv computes positions from a 2-D padding mask, got one with four axes: give position_ids as well"
            )
        return mask[:, 0].any(1)
    return keys.mask
