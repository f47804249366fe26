"""FLOPs of a run, operator by operator, with torch's own formulas and those of softkv's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from softkv.ops.engine import Call, Needs

_aten, _softkv = torch.ops.aten, torch.ops.softkv


class Flops(TorchDispatchMode):
    """Counts the FLOPs of all matrix products inside it.

    Attributes:
        total: so far.
        attention: the share of softkv's attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in _FORMULAS:
            count = _FORMULAS[operator](*args)
        else:
            formula = flop_registry.get(operator)
            count = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=out)
        self.total += count
        self.attention += count if operator in (_softkv.attention, _softkv.attention_backward) else 0
        return out


def _pairs(call: Call) -> tuple[int, int]:
    """The number of visible (query, token) and (query, slot) pairs, over all rows and heads."""
    q, k, prefix_k, starts = call["q"], call["k"], call["prefix_k"], call["cu_seqlens_q"]
    is_causal, window = call["is_causal"], call["window"]

    def seen(T: int, S: int) -> int:
        return sum(min(S - T + t + 1, window or S) for t in range(T)) if is_causal else T * S

    H = q.shape[-3] if starts is None else q.shape[1]
    if starts is None:
        tokens, queries = len(q) * seen(q.shape[2], k.shape[2]), len(q) * q.shape[2]
    else:
        lengths = starts.diff().tolist()
        tokens, queries = sum(seen(length, length) for length in lengths), sum(lengths)
    return H * tokens, H * queries * (0 if prefix_k is None else prefix_k.shape[2])


def _attention(*operands: Any) -> int:
    call = cast(Call, dict(zip(Call.__annotations__, operands, strict=False)))
    tokens, slots = _pairs(call)
    return 2 * (call["k"].shape[-1] + call["v"].shape[-1]) * (tokens + slots)


def _attention_backward(*operands: Any) -> int:
    """The scores again, and one product for each of dp, dq, dk, dv that is needed."""
    _, _, _, _, *of_call, _, wanted = operands
    call, needs = cast(Call, dict(zip(Call.__annotations__, of_call, strict=True))), Needs(*wanted)
    tokens, slots = _pairs(call)
    D, Dv = call["k"].shape[-1], call["v"].shape[-1]

    def widths(need_key: bool, need_value: bool) -> int:
        scores = needs.q or need_key
        return (scores or need_value) * (D + Dv * scores + D * needs.q + D * need_key + Dv * need_value)

    return 2 * (tokens * widths(needs.k, needs.v) + slots * widths(needs.prefix_k, needs.prefix_v))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _lstm(x: Tensor, into: Tensor, within: Tensor, *_: Any) -> int:
    """One direction of one layer."""
    return 2 * (x.numel() // x.shape[-1]) * (into.numel() + within.numel())


def _lstm_backward(*operands: Any) -> int:
    """Gradients of weights and inputs, which are computed even if not needed."""
    return 2 * _lstm(*operands)


_FORMULAS: dict[Any, Callable[..., int]] = {
    _softkv.attention: _attention,
    _softkv.attention_backward: _attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    _aten.mkldnn_rnn_layer: _lstm,
    _aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
