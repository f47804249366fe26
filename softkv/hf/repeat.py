"""The fast path of attention: blocks of one forward pass make the same call, so the checks and dispatch of the first
are reused by the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from softkv.hf.context import PackedRows, SoftContext
from softkv.hf.masks import is_constant
from softkv.ops.api import engine_for
from softkv.ops.checks import checked_reach, checked_scale, checked_softcap
from softkv.ops.engine import Call
from softkv.ops.operator import attention, load_engine, rows_of_memory

Signature = tuple[Any, ...]


def signature(
    context: SoftContext,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: tuple[Any, ...],
    others: dict[str, Any],
) -> Signature | None:
    """A key of everything that a block's path through attention depends on, except the prefix and tensor values that no
    check reads. None if every block must be checked.

    Args:
        options: numbers and flags passed by the module.
        others: further keywords.
    """
    if others.get("s_aux") is not None or others.get("position_bias") is not None or others.get("output_attentions"):
        return None
    device = query.device
    shape, of_keys, of_values = query.shape, key.shape, value.shape
    if shape[2] == 1:  # decoding: one more key per step
        of_keys, of_values = (of_keys[0], of_keys[1], of_keys[3]), of_values[3]  # type: ignore[assignment]
    return (
        type(module), id(getattr(module, "config", None)), getattr(module, "is_causal", True), shape, of_keys,
        of_values, query.dtype, key.dtype, value.dtype, id(mask), device, _autocasts(device.type), context.backend,
        *options, *others,
    )  # fmt: skip


def _autocasts(device: str) -> torch.dtype | None:
    if device == "meta" or not torch.is_autocast_enabled(device):  # where torch has no autocast, and raises
        return None
    return torch.get_autocast_dtype(device)


def checked_call(context: SoftContext, alike: Signature, mask: Tensor | None) -> CheckedCall | None:
    """An equal call that was already checked, in this forward pass or in an earlier step."""
    assert context.memo is not None
    lasting = _lasting(context, mask)
    found = None if lasting is None else lasting.get(alike)
    return context.memo.get(alike) if found is None else found


def _lasting(context: SoftContext, mask: Tensor | None) -> dict[Any, Any] | None:
    """The store of calls for later steps, or None if steps differ in more than the number of keys."""
    return context.lasting if is_constant(mask) else None


@dataclass(frozen=True)
class CheckedCall:
    """A block's call of the attention op that the public function has validated.

    Attributes:
        call: its arguments, except q, k, v and the prefix, which differ between blocks.
        dtype: of q, k, v and the prefix.
        prefix: the shapes and the device of the prefix's K and V, or None without one.
        engine: the engine that runs it.
        rows: the packed rows, or None.
        mask: kept alive, so that its `id` is not reused.
        step: the engine's faster path for one query per row without gradients, or None.
    """

    call: dict[str, Any]
    dtype: torch.dtype
    prefix: tuple[torch.Size, torch.Size, torch.device] | None
    engine: str
    rows: PackedRows | None
    mask: Tensor | None
    step: Callable[..., Tensor] | None

    def serves(self, context: SoftContext, layer: int) -> bool:
        """Whether the prefix of a block has the same form as that of the first."""
        return self.prefix == _form(context, layer)

    def __call__(self, context: SoftContext, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of another block: query `[B, H, T, D]` → `[B, T, H, Dv]`."""
        plain = not (torch.is_grad_enabled() or is_in_torch_dispatch_mode()) and type(query) is Tensor
        if plain and self.step is not None and context.layers is not None:
            operands = (query, key, value, *context.layers[layer])
            return self.step(*(_ready(x, self.dtype) for x in operands)).transpose(1, 2)
        if self.rows is not None:
            query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        dtype = self.dtype
        call = self.call.copy()
        call["q"], call["k"], call["v"] = _ready(query, dtype), _ready(key, dtype), _ready(value, dtype)
        if context.layers is not None:
            k, v = context.layers[layer]
            call["prefix_k"], call["prefix_v"] = _ready(k, dtype), _ready(v, dtype)
        if plain:  # the operator is not needed
            out, _ = load_engine(self.engine).forward(**call)
        else:
            out, _ = attention(cast(Call, call), self.engine, out_alone=True)
        return out.unsqueeze(0) if self.rows is not None else out.transpose(1, 2)


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    return rows_of_memory(x if x.dtype == dtype else x.to(dtype))


def _form(context: SoftContext, layer: int) -> tuple[torch.Size, torch.Size, torch.device] | None:
    if context.layers is None:
        return None
    k, v = context.layers[layer]
    return k.shape, v.shape, k.device


def remember(
    context: SoftContext,
    layer: int,
    alike: Signature,
    mask: Tensor | None,
    operands: tuple[Tensor, Tensor, Tensor],
    rows: PackedRows | None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    *,
    scale: float | None,
    is_causal: bool,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    **others: Any,
) -> None:
    """Store a call that the public function has validated, for blocks with equal calls.

    Args:
        operands: query, key and value `[B, ., T, D]` of the calling block.
        others: a backend, and sinks, of which there are none.
    """
    covers, kv = context.window_covers, None if context.layers is None else context.layers[layer]
    query, key, value = operands
    # The operator handles empty tensors and tensors without values.
    if query.numel() == 0 or query.is_meta or (kv is not None and (kv[0].numel() == 0 or kv[0].device != query.device)):
        return
    reaches = window is not None or chunk is not None
    if context.memo is None or context.backend == "reference" or (reaches and isinstance(covers, Tensor)):
        return
    if rows is not None:
        query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    prefix = context.of_layer(
        layer, len(operands[0]) if rows is None else len(rows.cu_seqlens) - 1, query.dtype, query.device
    )
    cu_seqlens, longest = (None, None) if rows is None else (rows.cu_seqlens, rows.longest)
    call = Call(
        q=query, k=key, v=value, prefix_k=prefix.get("prefix_k"), prefix_v=prefix.get("prefix_v"),
        prefix_index=prefix.get("prefix_index"), prefix_lengths=prefix.get("prefix_lengths"), key_mask=key_mask,
        key_lengths=key_lengths, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest,
        max_seqlen_k=longest, sinks=None, scale=checked_scale(scale, query.shape[-1]), is_causal=is_causal,
        window=checked_reach("window", window), window_covers_prefix=reaches and covers is True,
        chunk=checked_reach("chunk", chunk), softcap=checked_softcap(softcap),
    )  # fmt: skip
    engine = engine_for(context.backend, call)
    of_others = {**call, **dict.fromkeys(("q", "k", "v", "prefix_k", "prefix_v"))}
    stepping = rows is None and query.shape[2] == 1 and key_mask is None and key_lengths is None and not reaches
    step = getattr(load_engine(engine), "step", None) if stepping else None
    checked = CheckedCall(of_others, query.dtype, _form(context, layer), engine, rows, mask, step and step(call))
    lasting = _lasting(context, mask) if stepping else None
    (context.memo if lasting is None else lasting)[alike] = checked
