"""The fast path of attention: blocks of one forward pass make the same call, and so do further passes, so the checks
and dispatch of the first one hold for the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from softkv.hf.context import LayerKV, PackedRows, SoftContext
from softkv.hf.masks import is_constant
from softkv.ops import checks
from softkv.ops.api import engine_for
from softkv.ops.engine import Call
from softkv.ops.operator import attention, load_engine, rows_of_memory

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_NUMBERS = (int, float, type(None))
_ASKED = ("s_aux", "position_bias", "output_attentions")  # keywords that change a call by being there
_KEPT = 8


@dataclass(frozen=True, eq=False, slots=True)
class Given:
    """What the way of a block through attention depends on, but for the module, the prefix, and values of tensors that
    no check reads.

    Attributes:
        query: its shape; and so on. In a step of decoding without gradients, `keys` and `values` don't count the keys.
        mask: kept, so that no other one gets its `id`.
        options: numbers and flags that the module gives.
        layout: how the context lays out rows and their prefixes: packed rows (a line of them has the shape of one
            row), and which prefix each row has.
        names: of its further keywords.
        asked: those of them that must stay None.
    """

    query: torch.Size
    keys: tuple[int, ...]
    values: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    device: torch.device
    mask: Tensor | None
    options: tuple[Any, ...]
    layout: tuple[Any, ...]
    names: frozenset[str]
    asked: tuple[str, ...]
    grad: bool
    autocast: torch.dtype | None
    backend: str | None
    is_step: bool

    @classmethod
    def of(
        cls,
        context: SoftContext,
        operands: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: tuple[Any, ...],
        others: dict[str, Any],
    ) -> Given | None:
        """None where each block is looked at."""
        asked = tuple(name for name in _ASKED if name in others)
        if not _unasked(others, asked) or not all(isinstance(x, _NUMBERS) for x in options):
            return None
        query, key, value = operands
        grad, keys, values = torch.is_grad_enabled(), tuple(key.shape), tuple(value.shape)
        is_step = query.shape[2] == 1 and not grad
        if is_step:  # one more key each time
            keys, values = (*keys[:2], keys[3]), (*values[:2], values[3])
        return cls(
            query.shape, keys, values, (query.dtype, key.dtype, value.dtype), query.device, mask, options,
            _layout(context), frozenset(others), asked, grad, _autocasts(query.device.type), context.backend, is_step,
        )  # fmt: skip

    def again(
        self,
        context: SoftContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: tuple[Any, ...],
        others: dict[str, Any],
    ) -> bool:
        """Whether a call is given the same."""
        if query.shape != self.query or mask is not self.mask or options != self.options:
            return False
        keys: tuple[int, ...] = key.shape
        values: tuple[int, ...] = value.shape
        if self.is_step:
            keys, values = (*keys[:2], keys[3]), (*values[:2], values[3])
        return (
            keys == self.keys
            and values == self.values
            and all(a is b for a, b in zip(self.layout, _layout(context), strict=True))
            and others.keys() == self.names
            and (query.dtype, key.dtype, value.dtype) == self.dtypes
            and torch.is_grad_enabled() is self.grad
            and query.device == self.device
            and context.backend == self.backend
            and _autocasts(self.device.type) == self.autocast
            and (not self.asked or _unasked(others, self.asked))
        )


def _layout(context: SoftContext) -> tuple[Any, ...]:
    return context.rows, context.restarts, context.lengths, context.index


def _unasked(others: dict[str, Any], asked: tuple[str, ...]) -> bool:
    return all(others[name] is None or others[name] is False for name in asked)


def _autocasts(device: str) -> torch.dtype | None:
    if device == "meta" or not torch.is_autocast_enabled(device):  # where torch has no autocast, and raises
        return None
    return torch.get_autocast_dtype(device)


@dataclass(frozen=True, eq=False, slots=True)
class CheckedCall:
    """A block's call of the attention op that the public function has validated.

    Attributes:
        given: what it came from.
        kind: type, config and `is_causal` of the module that made it.
        call: its arguments, but for q, k, v and the prefix, which each block has of its own.
        dtype: of these.
        prefix: the shapes and the device of the prefix's K and V, or None without one.
        engine: that runs it.
        rows: the packed rows of a batch of one line, or None.
        step: the engine's shorter way (`step`, without gradients, or `differentiable`), or None.
    """

    given: Given
    kind: tuple[Any, ...]
    call: dict[str, Any]
    dtype: torch.dtype
    prefix: tuple[torch.Size, torch.Size, torch.device] | None
    engine: str
    rows: PackedRows | None
    step: Callable[..., Any] | None

    def attend(self, context: SoftContext, layer: int, module: nn.Module, query: Tensor) -> Attend | None:
        """What gives `[B, T, H, Dv]` of another block's query `[B, H, T, D]`, key and value; None where the module or
        its prefix is of another kind."""
        kv, steps = None if context.layers is None else context.layers[layer], context.steps
        if steps is not None:
            kept = steps.get(layer)
            if kept is not None and kept[0] is self and kept[1] is kv:
                return cast(Attend, kept[2])
        if _kind(module) != self.kind or _form(kv) != self.prefix:
            return None
        watched = type(query) is not Tensor or is_in_torch_dispatch_mode()
        watched |= self.given.grad and torch.autograd._profiler_enabled()  # the general way names its backward
        k, v = (None, None) if kv is None else (_ready(x, self.dtype) for x in kv)
        if self.step is None or watched:
            return self._general(k, v, watched)
        if self.given.grad:
            differentiable = self.step
            return lambda query, key, value: differentiable(query, key, value, k, v)
        attend = self.step(k, v)
        if steps is not None and (kv is None or (k is kv[0] and v is kv[1])):  # a copy would not follow what is learned
            steps[layer] = self, kv, attend
        return cast(Attend, attend)

    def _general(self, prefix_k: Tensor | None, prefix_v: Tensor | None, watched: bool) -> Attend:
        dtype, packed, alone = self.dtype, self.rows is not None, not (watched or self.given.grad)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if packed:
                query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
            call = self.call.copy()
            call["q"], call["k"], call["v"] = _ready(query, dtype), _ready(key, dtype), _ready(value, dtype)
            call["prefix_k"], call["prefix_v"] = prefix_k, prefix_v
            if alone:  # the operator has nothing to add
                out, _ = load_engine(self.engine).forward(**call)
            else:
                out, _ = attention(cast(Call, call), self.engine, out_alone=True)
            return out.unsqueeze(0) if packed else out.transpose(1, 2)

        return attend


class Lasting:
    """Calls of forward passes that further passes may repeat, the newest first. Threads share it.

    Args:
        steps_alone: keeps no others than those of decoding steps, where values of position ids mean nothing.
    """

    def __init__(self, *, steps_alone: bool = False) -> None:
        self.calls: tuple[CheckedCall, ...] = ()
        self.steps_alone = steps_alone

    def keep(self, call: CheckedCall, *, lasts: bool) -> None:
        if lasts and (call.given.is_step or not self.steps_alone):
            self.calls = (call, *self.calls[: _KEPT - 1])


class OfPass:
    """Calls that the blocks of one forward pass may repeat."""

    def __init__(self, lasting: Lasting | None = None) -> None:
        self.calls: tuple[CheckedCall, ...] = () if lasting is None else lasting.calls
        self.lasting = lasting

    def keep(self, call: CheckedCall, *, lasts: bool) -> None:
        self.calls = (call, *self.calls)
        if self.lasting is not None:
            self.lasting.keep(call, lasts=lasts)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return type(module), id(getattr(module, "config", None)), getattr(module, "is_causal", True)


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    return rows_of_memory(x if x.dtype == dtype else x.to(dtype))


def _form(kv: LayerKV | None) -> tuple[torch.Size, torch.Size, torch.device] | None:
    return None if kv is None else (kv[0].shape, kv[1].shape, kv[0].device)


def accepted(
    context: SoftContext,
    layer: int,
    module: nn.Module,
    given: Given,
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
) -> Attend | None:
    """What runs a block's call of the op, checked as the public function does, and kept for the blocks that are called
    alike. None for calls that are not kept.

    Args:
        operands: query, key and value `[B, ., T, D]` as the op takes them.
        others: a backend, and sinks, of which there are none.
    """
    covers, kv = context.window_covers, None if context.layers is None else context.layers[layer]
    query, key, value = operands
    # The operator handles empty tensors and tensors without values.
    if query.numel() == 0 or query.is_meta or (kv is not None and (kv[0].numel() == 0 or kv[0].device != query.device)):
        return None
    reaches = window is not None or chunk is not None
    if context.repeats is None or context.backend == "reference" or (reaches and isinstance(covers, Tensor)):
        return None
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
        max_seqlen_k=longest, sinks=None, scale=checks.checked_scale(scale, query.shape[-1]), is_causal=is_causal,
        window=checks.checked_reach("window", window), window_covers_prefix=reaches and covers is True,
        chunk=checks.checked_reach("chunk", chunk), softcap=checks.checked_softcap(softcap),
    )  # fmt: skip
    checks.check_queries(query, "[B, H, T, D]" if rows is None else "[N, H, D]")
    (checks.check_dense if rows is None else checks.check_packed)(call)
    checks.refuse_transforms(call)
    engine = engine_for(context.backend, call)
    of_others = {**call, **dict.fromkeys(("q", "k", "v", "prefix_k", "prefix_v"))}
    shorter = None
    if set(given.dtypes) == {query.dtype}:
        shorter = getattr(load_engine(engine), "differentiable" if given.grad else "step", None)
    step = None if shorter is None else shorter(call)
    checked = CheckedCall(given, _kind(module), of_others, query.dtype, _form(kv), engine, rows, step)
    # What is looked at in further passes: numbers alone.
    numbers = not any(isinstance(x, Tensor) for x in of_others.values())
    lasts = not reaches and numbers and is_constant(given.mask)
    context.repeats.keep(checked, lasts=lasts)
    return checked.attend(context, layer, module, query)
