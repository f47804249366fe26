"""transformers' attention contract, under the name "softkv": one mask function, one attention function.

`AttentionMaskInterface` calls `key_state` once a forward pass; `AttentionInterface` calls `attention` once a block.
Importing this module registers both, so `from_pretrained(..., attn_implementation="softkv")` works with or without
a soft prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from softkv.hf.context import Captured, PackedRows, SoftContext
from softkv.hf.local import two_sided_attention
from softkv.ops.api import prefix_attention, prefix_attention_varlen
from softkv.ranges import named

NAME = "softkv"

# Codes of a key state in int8. A static cache hands over its whole buffer, so a key may not exist yet; a padding key
# exists, takes a position, and is not seen.
HIDDEN, SEEN = 1, 2


def key_state(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Which keys exist and which are seen, in the fewest words (the dtype tells which):

    - None: all exist and are seen.
    - bool `[B, 1, 1, S]`: all exist, these are seen.
    - int32 `[1, 1, 1, 1]`: so many exist, and are seen.
    - int8 `[B, 1, 1, S]`: 0 does not exist, 1 exists but is hidden, 2 is seen.

    Four axes, because transformers hands a mask of four axes through `generate`, compiled decoding and checkpointing
    untouched.
    """
    if use_vmap:  # where or_mask_function or and_mask_function is given
        raise ValueError(
            'softkv attention is causal, windowed or full, but this model adds a mask of its own: use "eager" or "sdpa"'
        )
    end = q_offset + q_length - kv_offset
    part_filled = isinstance(end, Tensor) or end != kv_length
    if attention_mask is None:
        return torch.as_tensor(end, dtype=torch.int32, device=device).view(1, 1, 1, 1) if part_filled else None
    seen = attention_mask[:, kv_offset : kv_offset + kv_length]
    if not part_filled:
        return None if _all_real(seen) else seen[:, None, None, :]
    exists = (torch.arange(kv_length, device=device) < end).view(1, -1)
    seen = exists & F.pad(seen, (0, kv_length - seen.shape[1]))
    return (exists.to(torch.int8) + seen.to(torch.int8))[:, None, None, :]


def _all_real(mask: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(mask.all())


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
    """Attention of one block: query `[B, H, T, D]`, key and value `[B, G, S, D]` → (`[B, T, H, D]`, None)."""
    if output_attentions:
        raise ValueError('softkv attention never forms attention weights: use attn_implementation="eager" to see them')
    if dropout:
        raise ValueError(f"softkv attention has no dropout, got {dropout}: set the model's attention dropout to 0")
    if position_bias is not None:
        raise ValueError("softkv attention takes no position bias (T5, ALiBi): this model can't use it")
    if key.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"softkv attention needs values as wide as keys, got head sizes {value.shape[-1]} and {key.shape[-1]} "
            "(multi-head latent attention): this model can't use it"
        )
    context = softkv_prefix if softkv_prefix is not None else SoftContext()
    layer = getattr(module, "layer_idx", 0) if context.order is None else context.order.number(module, context.turns)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if context.capture is not None:
        context.capture.append(Captured(module, key, value, sliding_window, causal))

    device = query.device.type
    autocasts = device != "meta" and torch.is_autocast_enabled(device)  # torch knows no autocast there, and raises
    dtype = torch.get_autocast_dtype(device) if autocasts else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    options: dict[str, Any] = {
        "scale": scaling,
        "is_causal": causal,
        "window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux if s_aux is None else s_aux.to(dtype),
        "backend": context.backend,
    }
    rows = context.rows
    if softkv_prefix is None and attention_mask is None:
        rows = _rows_of_line(query, key, position_ids, cu_seq_lens_q, max_length_q)
    if rows is not None:
        if sliding_window is not None and not causal:
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
            out = _attend(attend, context, layer, len(rows.cu_seqlens) - 1, dtype, sliding_window)
        return out.unsqueeze(0), None

    key_mask, key_lengths = _decode_key_state(attention_mask, len(query))
    op = prefix_attention if causal or sliding_window is None else two_sided_attention
    attend = partial(op, query, key, value, key_mask=key_mask, key_lengths=key_lengths, **options)
    with named("attention, layer", layer):
        out = _attend(attend, context, layer, len(query), dtype, sliding_window)
    return out.transpose(1, 2), None


def _attend(
    attend: Callable[..., Any], context: SoftContext, layer: int, rows: int, dtype: torch.dtype, window: int | None
) -> Tensor:
    """Attention of one block with the context's prefixes. Where windows count the slots of some and not of others, it
    runs once for either kind."""
    prefix, covers = context.of_layer(layer, rows, dtype), context.window_covers
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
    return packed_rows(position_ids)


def packed_rows(position_ids: Tensor | None) -> PackedRows | None:
    """The rows of `position_ids` `[1, N]` that restart, or None where they don't."""
    if position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1 or position_ids.shape[1] < 2:
        return None
    starts = (position_ids[0].diff() != 1).nonzero().flatten() + 1
    if not len(starts):
        return None
    bounds = F.pad(starts, (1, 0))
    return PackedRows.from_lengths(F.pad(bounds, (0, 1), value=position_ids.shape[1]).diff())


def _decode_key_state(state: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """(key_mask `[B, S]`, key_lengths `[B]`) of a mask that `key_state` made, or of a 2-D padding mask."""
    if state is None:
        return None, None
    if state.dim() == 2:
        return state.bool().expand(batch, -1), None
    if state.shape[1:3] != (1, 1) or state.dtype.is_floating_point:
        raise ValueError(
            f"softkv attention takes a 2-D padding mask, got a mask of shape {tuple(state.shape)} and {state.dtype}: "
            'custom masks need attn_implementation="eager"'
        )
    state = state[:, 0, 0]
    if state.dtype == torch.bool:
        return state.expand(batch, -1), None
    if state.dtype == torch.int32:
        return None, state[:, 0].expand(batch)
    return (state == SEEN).expand(batch, -1), (state >= HIDDEN).sum(-1, dtype=torch.int32).expand(batch)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, key_state)
