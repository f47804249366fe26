"""transformers' attention contract, under the name "softkv": one mask function, one attention function.

`AttentionMaskInterface` calls `key_state` once per forward pass; `AttentionInterface` calls `attention` once per block.
Importing this module registers both, so `from_pretrained(..., attn_implementation="softkv")` works with or without a
soft prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from softkv.hf import attention_mass
from softkv.hf.chunks import chunked, counted_slots
from softkv.hf.context import BlockInputs, SoftContext
from softkv.hf.dense import in_front, masked_attention
from softkv.hf.keywords import HARMLESS, check_understood
from softkv.hf.local import two_sided_attention
from softkv.hf.masks import Keys, Pattern, key_state
from softkv.hf.packing import apart, rows_of_line
from softkv.hf.placement import check_rows_are_whole
from softkv.hf.repeat import CallCache, CallKey, validated
from softkv.ops.api import prefix_attention, prefix_attention_varlen
from softkv.ranges import named

NAME = "softkv"
_BARE = SoftContext(kept_calls=CallCache(steps_only=True))  # of a model without a soft prompt


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
    is_causal: bool | None = None,
    softkv_prefix: SoftContext | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one block: query `[B, H, T, D]`, key `[B, G, S, D]`, value `[B, G, S, Dv]` → `[B, T, H, Dv]`, None.

    Raises:
        ValueError: for arguments that it does not support.
    """
    context = _BARE if softkv_prefix is None else softkv_prefix
    layer = getattr(module, "layer_idx", 0) if context.order is None else context.order.number(module, context.turns)
    options = dropout, scaling, sliding_window, softcap, is_causal
    if context.line is None:
        return _of_rows(module, context, layer, query, key, value, attention_mask, options, others), None

    def attend(context: SoftContext, operands: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        query, key, value = operands
        return _of_rows(module, context, layer, query, key, value, mask, options, others)

    return context.line.attention(attend, context, layer, (query, key, value), attention_mask), None


def _of_rows(
    module: nn.Module,
    context: SoftContext,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    others: dict[str, Any],
) -> Tensor:
    """`[B, T, H, Dv]` of padded rows or of packed rows without heads, by a validated call if an equal one is kept."""
    call_key = None
    if context.kept_calls is not None and not torch.compiler.is_compiling():
        for checked in context.kept_calls.calls:
            if checked.key.matches(context, query, key, value, mask, options, others):
                attend = checked.attend(context, layer, module, query)
                if attend is not None:
                    with named("attention, layer", layer):
                        return attend(query, key, value)
        call_key = CallKey.of(context, (query, key, value), mask, options, others)
    return _checked(module, context, layer, query, key, value, mask, call_key, *options, **others)


def _checked(
    module: nn.Module,
    context: SoftContext,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    call_key: CallKey | None,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Like `_of_rows`, with full argument checks."""
    if output_attentions:
        raise ValueError('softkv attention never forms attention weights: use attn_implementation="eager" to see them')
    if dropout:
        raise ValueError(f"softkv attention has no dropout, got {dropout}: set the model's attention dropout to 0")
    check_understood(module, kwargs)
    if not torch.compiler.is_compiling():
        check_rows_are_whole()
    keys = Keys.of(attention_mask, len(query))
    causal, window, chunk = keys.causal, sliding_window, None
    if causal is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if keys.pattern is Pattern.WINDOWED:
        window = _reach(module, "sliding_window", sliding_window)
    elif keys.pattern is Pattern.LOCAL:
        window = _reach(module, "sliding_window") + 1
    elif keys.pattern is Pattern.CHUNKED:
        window, chunk = None, _reach(module, "attention_chunk_size")
    elif keys.pattern is not None:
        window = None
    if context.capture is not None:
        context.capture.append(BlockInputs(module, key, value, chunk or window, causal))

    device = query.device.type
    autocasts = device != "meta" and torch.is_autocast_enabled(device)  # torch raises for "meta"
    dtype = torch.get_autocast_dtype(device) if autocasts else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    like: dict[str, Any] = {"dtype": dtype, "device": query.device}
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux if s_aux is None else s_aux.to(dtype),
        "backend": context.backend,
    }
    rows, allowed, seen = context.rows, keys.allowed, None
    if chunk is not None and keys.at is None and key.shape[2] + _slots(context, layer) <= chunk:
        chunk = None
    if context.restarts is not None:
        of_one_row = apart(query, key, context.restarts)
        allowed = of_one_row if of_one_row is None else of_one_row & keys.matrix(causal, window, query.shape[2], key)
    elif rows is None and (keys.packed or (context is _BARE and keys.may_be_packed(cu_seq_lens_q))):
        rows = rows_of_line(query, key, position_ids, cu_seq_lens_q, max_length_q, attention_mask)
        if rows is None and torch.compiler.is_compiling():
            of_one_row = apart(query, key, position_ids)
            allowed = (
                of_one_row if of_one_row is None else of_one_row & keys.matrix(causal, window, query.shape[2], key)
            )
        elif rows is None and keys.packed:
            raise ValueError(
                f"{type(module).__name__} separates packed rows by a mask, but passes no position_ids to its "
                'attention, which softkv needs: give padded rows, or use attn_implementation="eager"'
            )
    if chunk is not None and allowed is not None:
        raise ValueError("compiled calls expect no packed rows longer than the chunks of attention: give padded rows")
    counted = (window or chunk) is not None and context.layers is not None and context.window_covers is not False
    if chunk is not None and rows is None and not (keys.mask is None and keys.lengths is None):
        slots = _slots(context, layer)
        allowed, seen = chunked(keys, chunk, counted_slots(context, len(query)), query.shape[2], key, slots)
    if position_bias is not None or allowed is not None:
        if allowed is None:
            allowed = keys.matrix(causal, window, query.shape[2], key)
        plain_positions = seen is not None or (position_ids is not None and position_ids.dim() == 2)
        if rows is not None or (counted and (position_bias is not None or not plain_positions)):
            raise ValueError(
                f"{type(module).__name__} has its own mask or position bias, which softkv supports in padded rows "
                "only, and with a window that counts prefix slots only if it passes positions"
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
            if seen is None:
                assert window is not None
                assert position_ids is not None
                seen = _within(window, position_ids, context, prefix)
            key, value, allowed, _ = in_front(key, value, allowed, None, prefix, seen=seen)
            prefix = {}
        out = masked_attention(query, key, value, allowed, position_bias, prefix, **options)
        return out.transpose(1, 2).contiguous()  # some models view it
    options |= {"is_causal": causal, "window": window, "chunk": chunk}
    if rows is not None:
        if window is not None and not causal:
            raise ValueError("packed rows expect no windows in bidirectional attention: pad them (PaddingCollator)")
        if call_key is not None and rows is context.rows and HARMLESS.issuperset(kwargs):
            reused = validated(context, layer, module, call_key, (query, key, value), rows, **options)
            if reused is not None:
                with named("attention, layer", layer):
                    return reused(query, key, value)
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
            return _attend(attend, context, layer, len(rows.cu_seqlens) - 1, like, counted).unsqueeze(0)

    op = prefix_attention if causal or window is None else two_sided_attention
    if call_key is not None and op is prefix_attention and HARMLESS.issuperset(kwargs):
        operands = query, key, value
        reused = validated(context, layer, module, call_key, operands, None, keys.mask, keys.lengths, **options)
        if reused is not None:
            with named("attention, layer", layer):
                return reused(query, key, value)
    attend = partial(op, query, key, value, key_mask=keys.mask, key_lengths=keys.lengths, **options)
    with named("attention, layer", layer):
        return _attend(attend, context, layer, len(query), like, counted).transpose(1, 2)


def _within(window: int, positions: Tensor, context: SoftContext, prefix: dict[str, Any]) -> Tensor:
    """The slots within each query's window, `[B or 1, T, P]`: slot p is at position p of its row."""
    inside = positions[:, :, None] - torch.arange(prefix["prefix_k"].shape[2], device=positions.device) < window
    covers = context.window_covers
    if not isinstance(covers, Tensor):
        return inside
    covered = covers.to(positions.device)[prefix["prefix_index"].clamp(min=0)]
    return inside | ~covered[:, None, None]


def _reach(module: nn.Module, name: str, given: int | None = None) -> int:
    """The size of a window, or of chunks."""
    size = given if given is not None else getattr(getattr(module, "config", None), name, None)
    if size is None:
        raise ValueError(f"{type(module).__name__} has a mask of windows or chunks, but passes its attention no {name}")
    return int(size)


def _slots(context: SoftContext, layer: int) -> int:
    """P of the bank that a block reads."""
    return 0 if context.layers is None else context.layers[layer][0].shape[2]


def _attend(
    attend: Callable[..., Any], context: SoftContext, layer: int, rows: int, like: dict[str, Any], counted: bool
) -> Tensor:
    """Attention of one block with the context's prefixes. If windows or chunks count the slots of some prefixes only,
    it runs once for each kind.

    Args:
        counted: whether they count any.
    """
    prefix, covers = context.of_layer(layer, rows, **like), context.window_covers
    if context.masses is not None and prefix:
        context.masses[layer] = attention_mass.of_call(
            attend, prefix | ({"window_covers_prefix": covers} if counted else {})
        )
    if not counted:
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


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, key_state)
