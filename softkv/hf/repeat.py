"""The fast path of attention. All blocks of a forward pass make the same call of the op, and so do later passes, so a
call that equals a validated one skips validation and dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
_UNSUPPORTED = ("s_aux", "position_bias", "output_attentions")  # calls that set one of these are never reused
_CACHE_SIZE = 8


@dataclass(frozen=True, eq=False, slots=True)
class CallKey:
    """Everything that validation and dispatch of a block's call depend on, except the module and its prefix.

    Attributes:
        query, keys, values: shapes. In a decoding step without gradients, `keys` and `values` leave out S, which grows.
        mask: the mask itself, held so that its `id` is not reused.
        options: numbers and flags passed by the module.
        layout: packed rows (which a shape does not show) and the prefix of each row.
        names: the other keywords passed by the module.
        unset: those of them that must be None or False.
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
    unset: tuple[str, ...]
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
    ) -> CallKey | None:
        """The key of a call; None if every block must be validated separately."""
        unset = tuple(name for name in _UNSUPPORTED if name in others)
        if not _all_unset(others, unset) or not all(isinstance(x, _NUMBERS) for x in options):
            return None
        query, key, value = operands
        grad, keys, values = torch.is_grad_enabled(), tuple(key.shape), tuple(value.shape)
        is_step = query.shape[2] == 1 and not grad
        if is_step:
            keys, values = (*keys[:2], keys[3]), (*values[:2], values[3])
        return cls(
            query.shape, keys, values, (query.dtype, key.dtype, value.dtype), query.device, mask, options,
            _layout(context), frozenset(others), unset, grad, _autocast_dtype(query.device.type), context.backend,
            is_step,
        )  # fmt: skip

    def matches(
        self,
        context: SoftContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: tuple[Any, ...],
        others: dict[str, Any],
    ) -> bool:
        """Whether a call has this key."""
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
            and _autocast_dtype(self.device.type) == self.autocast
            and (not self.unset or _all_unset(others, self.unset))
        )


def _layout(context: SoftContext) -> tuple[Any, ...]:
    return context.rows, context.restarts, context.lengths, context.index


def _all_unset(others: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(others[name] is None or others[name] is False for name in names)


def _autocast_dtype(device: str) -> torch.dtype | None:
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch raises for "meta"
        return None
    return torch.get_autocast_dtype(device)


@dataclass(frozen=True, eq=False, slots=True)
class CheckedCall:
    """A validated call of the attention op by one block, which other blocks and passes may reuse.

    Attributes:
        key: what the call depends on.
        kind: the type, config and `is_causal` of the module that made it.
        call: the arguments of the op, except q, k, v and the prefix, which differ from block to block.
        dtype: of q, k, v and the prefix.
        prefix: the shapes and the device of the prefix's K and V; None without a prefix.
        engine: the name of the engine that runs it.
        rows: the packed rows of a batch; None for padded rows.
        step: the engine's faster path (`differentiable` with gradients, else `step`), or None.
    """

    key: CallKey
    kind: tuple[Any, ...]
    call: dict[str, Any]
    dtype: torch.dtype
    prefix: tuple[torch.Size, torch.Size, torch.device] | None
    engine: str
    rows: PackedRows | None
    step: Callable[..., Any] | None

    def attend(self, context: SoftContext, layer: int, module: nn.Module, query: Tensor) -> Attend | None:
        """A function from another block's query `[B, H, T, D]`, key and value to `[B, T, H, Dv]`; None if the module or
        its prefix does not match."""
        kv, steps = None if context.layers is None else context.layers[layer], context.steps
        if steps is not None:
            kept = steps.get(layer)
            if kept is not None and kept[0] is self and kept[1] is kv:
                return cast(Attend, kept[2])
        if _kind(module) != self.kind or _prefix_shapes(kv) != self.prefix:
            return None
        traced = type(query) is not Tensor or is_in_torch_dispatch_mode()
        traced |= self.key.grad and torch.autograd._profiler_enabled()  # only the operator names its backward
        k, v = (None, None) if kv is None else (_prepared(x, self.dtype) for x in kv)
        if self.step is None or traced:
            return self._by_operator(k, v, traced)
        if self.key.grad:
            differentiable = self.step
            return lambda query, key, value: differentiable(query, key, value, k, v)
        attend = self.step(k, v)
        if steps is not None and (kv is None or (k is kv[0] and v is kv[1])):  # a copy would miss optimizer steps
            steps[layer] = self, kv, attend
        return cast(Attend, attend)

    def _by_operator(self, prefix_k: Tensor | None, prefix_v: Tensor | None, traced: bool) -> Attend:
        dtype, packed, direct = self.dtype, self.rows is not None, not (traced or self.key.grad)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if packed:
                query, key, value = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
            call = self.call.copy()
            call["q"], call["k"], call["v"] = (_prepared(x, dtype) for x in (query, key, value))
            call["prefix_k"], call["prefix_v"] = prefix_k, prefix_v
            if direct:  # without gradients or tracing, the operator would only add overhead
                out, _ = load_engine(self.engine).forward(**call)
            else:
                out, _ = attention(cast(Call, call), self.engine, out_alone=True)
            return out.unsqueeze(0) if packed else out.transpose(1, 2)

        return attend


class CallCache:
    """Validated calls that later forward passes may reuse, the newest first. Shared by threads.

    Args:
        steps_only: keep decoding steps only, where position ids can't mark packed rows.
    """

    def __init__(self, *, steps_only: bool = False) -> None:
        self.calls: tuple[CheckedCall, ...] = ()
        self.steps_only = steps_only

    def __reduce__(self) -> Any:
        """Copies of a model validate their own calls."""
        return partial(CallCache, steps_only=self.steps_only), ()

    def keep(self, call: CheckedCall, *, across_passes: bool) -> None:
        if across_passes and (call.key.is_step or not self.steps_only):
            self.calls = (call, *self.calls[: _CACHE_SIZE - 1])


class PassCalls:
    """Validated calls that the other blocks of one forward pass may reuse, starting with those of a `CallCache`."""

    def __init__(self, cache: CallCache | None = None) -> None:
        self.calls: tuple[CheckedCall, ...] = () if cache is None else cache.calls
        self.cache = cache

    def keep(self, call: CheckedCall, *, across_passes: bool) -> None:
        self.calls = (call, *self.calls)
        if self.cache is not None:
            self.cache.keep(call, across_passes=across_passes)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return type(module), id(getattr(module, "config", None)), getattr(module, "is_causal", True)


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    return rows_of_memory(x if x.dtype == dtype else x.to(dtype))


def _prefix_shapes(kv: LayerKV | None) -> tuple[torch.Size, torch.Size, torch.device] | None:
    return None if kv is None else (kv[0].shape, kv[1].shape, kv[0].device)


def validated(
    context: SoftContext,
    layer: int,
    module: nn.Module,
    call_key: CallKey,
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
    """Validate a block's call as the public function does, keep it for equal calls, and return the function that runs
    it; None for calls that can't be reused.

    Args:
        operands: query, key and value `[B, ., T, D]`, as the op takes them.
        **others: ignored: the backend, which is the context's, and sinks, which are None here.
    """
    covers, kv = context.window_covers, None if context.layers is None else context.layers[layer]
    query, key, value = operands
    # The operator handles empty tensors and tensors without values.
    if query.numel() == 0 or query.is_meta or (kv is not None and (kv[0].numel() == 0 or kv[0].device != query.device)):
        return None
    reaches = window is not None or chunk is not None
    if context.kept_calls is None or context.backend == "reference" or (reaches and isinstance(covers, Tensor)):
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
    shared = {**call, **dict.fromkeys(("q", "k", "v", "prefix_k", "prefix_v"))}
    fast_path = None
    if set(call_key.dtypes) == {query.dtype}:
        fast_path = getattr(load_engine(engine), "differentiable" if call_key.grad else "step", None)
    step = None if fast_path is None else fast_path(call)
    checked = CheckedCall(call_key, _kind(module), shared, query.dtype, _prefix_shapes(kv), engine, rows, step)
    # Tensors (masks, lengths, packed rows) may hold other values in the next pass.
    numbers_only = not any(isinstance(x, Tensor) for x in shared.values())
    across_passes = not reaches and numbers_only and is_constant(call_key.mask)
    context.kept_calls.keep(checked, across_passes=across_passes)
    return checked.attend(context, layer, module, query)
