"""transformers' attention contract, under the name "softkv": one mask function, one attention function.

`AttentionMaskInterface` calls `key_state` once a forward pass; `AttentionInterface` calls `attention` once a block.
Importing this module registers both, so `from_pretrained(..., attn_implementation="softkv")` works with or without
a soft prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
)

from softkv.hf import calls
from softkv.hf.context import BlockInputs, PackedRows, SoftContext
from softkv.hf.dense import in_front, masked_attention
from softkv.hf.key_state import AllReal, KeyState
from softkv.hf.keywords import HARMLESS, check_understood
from softkv.hf.local import two_sided_attention
from softkv.hf.placement import check_rows_are_whole
from softkv.hf.repeat import remember, signature
from softkv.ops.api import prefix_attention, prefix_attention_varlen
from softkv.ranges import named

NAME = "softkv"


class Pattern(IntEnum):
    """Which keys a query sees beside those that a key state hides. The numbers are sizes of an axis, odd ones, so that
    a model with attention of its own can't add a key state to its scores unnoticed."""

    CAUSAL = 11
    WINDOWED = 13  # causal, the last `sliding_window` keys
    CHUNKED = 17  # causal, within `attention_chunk_size` keys
    FULL = 19
    LOCAL = 23  # bidirectional, within `sliding_window` keys on either side


_BIDIRECTIONAL = (Pattern.FULL, Pattern.LOCAL)

# Codes of a key state in int8. A static cache hands over its whole buffer, so a key may not exist yet; a padding key
# exists, takes a position, and is not seen.
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
    """Which keys exist and which are seen, in the most compact form; the dtype identifies it:

    - int8 `[1, pattern, rows, 0]`: all exist and are seen.
    - int32 `[1, pattern, rows, 1]`: so many exist, and are seen.
    - int8 `[B, pattern, rows, S]`: 0 does not exist, 1 exists but is hidden, 2 is seen.
    - bool `[B, 1, T, S]`: what each query sees, where a model adds a mask of its own (blocks of an image).

    `pattern` is a `Pattern`; `rows` is 2 for packed rows, which position ids tell. Four axes, because transformers
    hands a mask of four axes through `generate`, compiled decoding and checkpointing untouched.

    Raises:
        ValueError: when the attention of the model is not transformers' interface: it would not understand this.
    """
    _check_interface(config)
    pattern, packed = _pattern(mask_function, use_vmap, local_size, config, kwargs)
    if torch.compiler.is_compiling() and attention_mask is not None:  # transformers packs rows without one only
        packed = False
    if pattern is Pattern.CHUNKED and kv_length + kv_offset <= cast(int, local_size):
        pattern = Pattern.CAUSAL
    cut = pattern is Pattern.CHUNKED or (pattern is Pattern.LOCAL and q_length != kv_length)
    if packed and torch.compiler.is_compiling():
        # A tracer can't tell: a SoftModel knows its rows, and neither padded nor cached ones are packed.
        packed = calls.under_way() is None and attention_mask is None and q_length == kv_length
        cut = cut or packed
    if pattern is None or cut or (packed and batch_size > 1):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
    # Compilers see masks of decoding steps, and would keep the guard; a prefill has come before.
    guarded = not torch.compiler.is_compiling() and (q_length > 1 or kwargs.get("allow_is_causal_skip", True))
    rows = 1 + packed
    end = kv_length if pattern in _BIDIRECTIONAL else q_offset + q_length - kv_offset
    part_filled = isinstance(end, Tensor) or end != kv_length
    seen = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    if seen is None and part_filled:
        count = torch.as_tensor(end, dtype=torch.int32, device=device).view(1, 1, 1, 1)
        return _made(count.expand(1, pattern, rows, 1), guarded)
    if seen is None or (not part_filled and _all_real(seen)):
        return _made(torch.empty(1, pattern, rows, 0, dtype=torch.int8, device=device), guarded)
    exists = (torch.arange(kv_length, device=device) < end).view(1, -1)
    seen = exists & F.pad(seen, (0, kv_length - seen.shape[1]))
    state = exists.to(torch.int8) + seen.to(torch.int8)
    return _made(state[:, None, None, :].expand(-1, pattern, rows, -1), guarded)


def _made(state: Tensor, guarded: bool) -> Tensor:
    return state.as_subclass(KeyState) if guarded else state


def _pattern(
    mask_function: Any, use_vmap: bool, local_size: int | None, config: Any, kwargs: dict[str, Any]
) -> tuple[Pattern | None, bool]:
    """The pattern of a mask function of transformers (None: another one), and whether it keeps packed rows apart."""
    # By identity and "==": in a compiled frame, `in` misses a name in a tuple of names.
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
    if torch.compiler.is_compiling():  # a tracer can't look into closures
        return True
    return any(map(_keeps_rows_apart, mask_function.__closure__[0].cell_contents))


_INTERSECTION = and_masks().__qualname__
_ROWS_APART = packed_sequence_mask_function(torch.empty(0)).__qualname__


def _check_interface(config: Any) -> None:
    """transformers' models import its attention interface by one name; those that don't have attention of their own."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    modeling = sys.modules.get(name)
    if modeling is not None and name != type(config).__module__ and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"{type(config).__name__.removesuffix('Config')} models do not take their attention from transformers' "
            'attention interface, so softkv can\'t reach it: use attn_implementation="eager"'
        )


def _all_real(mask: Tensor) -> bool:
    if isinstance(mask, AllReal):
        return True
    return mask.device.type != "meta" and not torch.compiler.is_compiling() and bool(mask.all())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    softkv_prefix: SoftContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one block: query `[B, H, T, D]`, key `[B, G, S, D]`, value `[B, G, S, Dv]` → `[B, T, H, Dv]`, None.

    Raises:
        ValueError: for whatever it is given and does not understand.
    """
    context = softkv_prefix if softkv_prefix is not None else SoftContext()
    layer = getattr(module, "layer_idx", 0) if context.order is None else context.order.number(module, context.turns)
    alike = None
    plain = s_aux is None and position_bias is None and not (dropout or output_attentions)
    if context.memo is not None and plain:
        alike = signature(
            module, query, key, value, attention_mask, scaling, sliding_window, softcap, is_causal, *kwargs
        )
        checked = context.memo.get(alike)
        if checked is not None and checked.serves(context, layer):
            with named("attention, layer", layer):
                return checked(context, layer, query, key, value), None
    if output_attentions:
        raise ValueError('softkv attention never forms attention weights: use attn_implementation="eager" to see them')
    if dropout:
        raise ValueError(f"softkv attention has no dropout, got {dropout}: set the model's attention dropout to 0")
    check_understood(module, kwargs)
    if not torch.compiler.is_compiling():
        check_rows_are_whole()
    keys = _Keys.of(attention_mask, len(query))
    causal, window = keys.causal, sliding_window
    if causal is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if keys.pattern is Pattern.WINDOWED:
        window = _window(module, sliding_window)
    elif keys.pattern is Pattern.LOCAL:
        window = _window(module, None) + 1
    elif keys.pattern is not None:
        window = None
    if context.capture is not None:
        context.capture.append(BlockInputs(module, key, value, window, causal))

    device = query.device.type
    autocasts = device != "meta" and torch.is_autocast_enabled(device)  # torch knows no autocast there, and raises
    dtype = torch.get_autocast_dtype(device) if autocasts else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    like: dict[str, Any] = {"dtype": dtype, "device": query.device}
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux if s_aux is None else s_aux.to(dtype),
        "backend": context.backend,
    }
    rows, allowed = context.rows, keys.allowed
    if rows is None and (keys.packed or (softkv_prefix is None and keys.may_be_packed(cu_seq_lens_q))):
        rows = _rows_of_line(query, key, position_ids, cu_seq_lens_q, max_length_q)
        if rows is None and torch.compiler.is_compiling():
            apart = _apart(query, key, position_ids)
            allowed = apart if apart is None else apart & keys.matrix(causal, window, query.shape[2], key)
        elif rows is None and keys.packed:
            raise ValueError(
                f"{type(module).__name__} keeps packed rows apart by a mask, but passes no position_ids to its "
                'attention, which softkv tells them by: give padded rows, or use attn_implementation="eager"'
            )
    if position_bias is not None or allowed is not None:
        if allowed is None:
            allowed = keys.matrix(causal, window, query.shape[2], key)
        counted = window is not None and context.layers is not None and context.window_covers is not False
        plain_positions = position_ids is not None and position_ids.dim() == 2
        if rows is not None or (counted and (position_bias is not None or not plain_positions)):
            raise ValueError(
                f"{type(module).__name__} has a mask or a position bias of its own, which softkv takes in padded rows "
                "only, and beside a window that counts the slots of a prefix only where it tells positions"
            )
        prefix = context.of_layer(layer, len(query), **like)
        if prefix and context.bias is not None and position_bias is not None:
            T, P = query.shape[2], prefix["prefix_k"].shape[2]
            before = (key.shape[2] if keys.lengths is None else keys.lengths[0]) - T
            of_slots = context.bias(module, T, before, P)
            if of_slots is not None:
                key, value, allowed, position_bias = in_front(
                    key, value, allowed, position_bias, prefix, of_slots=of_slots
                )
                prefix = {}
        elif prefix and counted:
            assert window is not None
            assert position_ids is not None
            seen = _within(window, position_ids, context, prefix)
            key, value, allowed, _ = in_front(key, value, allowed, None, prefix, seen=seen)
            prefix = {}
        out = masked_attention(query, key, value, allowed, position_bias, prefix, **options)
        return out.transpose(1, 2).contiguous(), None  # some models view it
    options |= {"is_causal": causal, "window": window}
    if rows is not None:
        if window is not None and not causal:
            raise ValueError("packed rows expect no windows in bidirectional attention: pad them (PaddingCollator)")
        attend: Callable[..., Any] = partial(
            prefix_attention_varlen,
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            rows.cu_seqlens,
            rows.cu_seqlens,
            rows.longest,
            rows.longest,
            **options,
        )
        with named("attention, layer", layer):
            out = _attend(attend, context, layer, len(rows.cu_seqlens) - 1, like, window)
        if alike is not None and rows is context.rows and HARMLESS.issuperset(kwargs):
            remember(context, layer, alike, attention_mask, (query, key, value), rows, **options)
        return out.unsqueeze(0), None

    op = prefix_attention if causal or window is None else two_sided_attention
    attend = partial(op, query, key, value, key_mask=keys.mask, key_lengths=keys.lengths, **options)
    with named("attention, layer", layer):
        out = _attend(attend, context, layer, len(query), like, window)
    if alike is not None and op is prefix_attention and HARMLESS.issuperset(kwargs):
        operands = (query, key, value)
        remember(context, layer, alike, attention_mask, operands, None, keys.mask, keys.lengths, **options)
    return out.transpose(1, 2), None


def _within(window: int, positions: Tensor, context: SoftContext, prefix: dict[str, Any]) -> Tensor:
    """Which slots windows leave to each query, `[B or 1, T, P]`: slot p stands at position p of its row."""
    inside = positions[:, :, None] - torch.arange(prefix["prefix_k"].shape[2], device=positions.device) < window
    covers = context.window_covers
    if not isinstance(covers, Tensor):
        return inside
    covered = covers.to(positions.device)[prefix["prefix_index"].clamp(min=0)]
    return inside | ~covered[:, None, None]


def _window(module: nn.Module, given: int | None) -> int:
    window = given if given is not None else getattr(getattr(module, "config", None), "sliding_window", None)
    if window is None:
        raise ValueError(f"{type(module).__name__} has a windowed mask, but tells its attention no sliding_window")
    return int(window)


def _attend(
    attend: Callable[..., Any], context: SoftContext, layer: int, rows: int, like: dict[str, Any], window: int | None
) -> Tensor:
    """Attention of one block with the context's prefixes. Where windows count the slots of some and not of others, it
    runs once for either kind."""
    prefix, covers = context.of_layer(layer, rows, **like), context.window_covers
    if window is None:
        return cast(Tensor, attend(**prefix))
    if not isinstance(covers, Tensor):
        return cast(Tensor, attend(**prefix, window_covers_prefix=covers))
    index = prefix.pop("prefix_index")
    covered = (index >= 0) & covers[index.clamp(min=0)]
    counting = attend(**prefix, prefix_index=index.masked_fill(~covered, -1), window_covers_prefix=True)
    others = attend(**prefix, prefix_index=index.masked_fill(covered, -1), window_covers_prefix=False)
    if context.rows is not None:
        covered = covered.repeat_interleave(context.rows.cu_seqlens.diff(), output_size=len(others))
    return torch.where(covered.view(-1, *[1] * (others.dim() - 1)), counting, others)


def _rows_of_line(
    query: Tensor, key: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, longest: int | None
) -> PackedRows | None:
    """The packed rows of a batch of one line, as transformers' collators give them: cumulative lengths, or
    position ids that restart."""
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        return None
    if cu_seqlens is not None and longest is not None:
        return PackedRows(cu_seqlens.to(torch.int32), longest)
    return None if torch.compiler.is_compiling() else packed_rows(position_ids)


def _apart(query: Tensor, key: Tensor, position_ids: Tensor | None) -> Tensor | None:
    """bool `[1, 1, T, T]`: which tokens of a line are of one packed row: a tracer can't read how many there are."""
    T = query.shape[2]
    if position_ids is None or len(query) != 1 or key.shape[2] != T or position_ids.shape != (1, T) or T == 1:
        return None
    row = F.pad((position_ids[0].diff() != 1).cumsum(0), (1, 0))
    return (row[:, None] == row)[None, None]


def packed_rows(position_ids: Tensor | None) -> PackedRows | None:
    """The rows of `position_ids` `[1, N]` that restart, or None where they don't."""
    if position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1 or position_ids.shape[1] < 2:
        return None
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    if not len(starts):
        return None
    bounds = F.pad(starts, (1, 0))
    return PackedRows.from_lengths(F.pad(bounds, (0, 1), value=position_ids.shape[1]).diff())


class _Keys(NamedTuple):
    """What a mask says of the keys: a key state, a 2-D padding mask, or a matrix of what each query sees.

    Attributes:
        pattern: None where it says nothing of it.
        packed: whether packed rows are kept apart.
        mask: `[B, S]`, the keys that are seen, or None for all.
        lengths: `[B]`, how many keys exist, or None for all.
        allowed: bool or added to scores, `[B or 1, H or 1, T or 1, S]`, what each query sees.
    """

    pattern: Pattern | None = None
    packed: bool = False
    mask: Tensor | None = None
    lengths: Tensor | None = None
    allowed: Tensor | None = None

    @classmethod
    def of(cls, state: Tensor | None, batch: int) -> _Keys:
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
        if state.dtype == torch.int32:
            return cls(pattern, packed, lengths=state[:, 0].expand(batch))
        exists = (state >= HIDDEN).sum(-1, dtype=torch.int32).expand(batch)
        return cls(pattern, packed, (state == SEEN).expand(batch, -1), None if pattern in _BIDIRECTIONAL else exists)

    def may_be_packed(self, cu_seqlens: Tensor | None) -> bool:
        """Whether position ids that restart are taken for packed rows, as flash attention takes them. An encoder's may
        restart with a row's second part."""
        all_seen = self.mask is None and self.lengths is None and self.allowed is None
        return all_seen and (self.pattern not in _BIDIRECTIONAL or cu_seqlens is not None)

    @property
    def causal(self) -> bool | None:
        """None where the mask does not tell."""
        return None if self.pattern is None else self.pattern not in _BIDIRECTIONAL

    def matrix(self, causal: bool, window: int | None, queries: int, keys: Tensor) -> Tensor:
        """bool `[B or 1, 1, T, S]`: what each of T queries sees of keys `[B, G, S, D]`."""
        at = torch.arange(keys.shape[2], device=keys.device)
        end = at.new_tensor([len(at)]) if self.lengths is None else self.lengths
        query = end[:, None, None] - queries + at.new_tensor(range(queries))[:, None]  # [B or 1, T, 1]
        sees = at < end[:, None, None].expand(-1, queries, 1)
        if causal:
            sees = sees & (at <= query)
        if window is not None:
            sees = sees & (at > query - window) & (at < query + window)
        if self.mask is not None:
            sees = sees & self.mask[:, None]
        return sees[:, None]


def padding_mask(mask: Any) -> Tensor | None:
    """`[B, S]`, the keys that are seen, of what a model hands to its decoder as attention mask: one, or one of each
    kind of layer (wrapped models make them outside). None where it hides none.

    Raises:
        ValueError: for a mask that says what each query sees.
    """
    if isinstance(mask, dict):
        found = [padding_mask(each) for each in mask.values() if each is not None]
        return max((each for each in found if each is not None), key=lambda each: each.shape[1], default=None)
    if mask is None or mask.dim() == 2:
        return mask
    keys = _Keys.of(mask, len(mask))
    if keys.allowed is not None:
        if mask.dtype != torch.bool:
            raise ValueError(
                "softkv tells positions by a 2-D padding mask, got one of four axes: give position_ids beside it"
            )
        return mask[:, 0].any(1)
    return keys.mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, key_state)
