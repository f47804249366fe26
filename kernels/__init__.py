"""Triton kernels of softkv: attention over tokens and over a prefix that is never copied; forward, backward, decoding.

`forward` and `backward` are the engine behind `softkv.prefix_attention(..., backend="triton")`. Arguments are not
validated here; the public op does that. Nothing synchronises with the device. What a call allocates and launches
depends on shapes alone, so it is planned once (`softkv.kernels.launch`), and a call can be captured in a CUDA graph.
Axes as in `softkv.prefix_attention`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from softkv.kernels.decode import MOST_QUERIES, plan_decode
from softkv.kernels.dkv import plan_dkv
from softkv.kernels.dq import plan_dq
from softkv.kernels.forward import plan_forward
from softkv.kernels.launch import Plan, Tensors, interpreter_enabled
from softkv.kernels.plans import find_plan
from softkv.kernels.prepare import plan_prepare
from softkv.kernels.problem import DTYPES, MOST_HEAD_DIM, Options, Problem, contiguous
from softkv.kernels.reduce import plan_add_parts

__all__ = ["DTYPES", "MOST_HEAD_DIM", "backward", "forward", "interpreter_enabled"]

GRADIENTS = ("dq", "dk", "dv", "dprefix_k", "dprefix_v", "dsinks")


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, *,
    prefix_index: Tensor | None = None, prefix_lengths: Tensor | None = None, key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, sinks: Tensor | None = None, scale: float,
    is_causal: bool, window: int | None = None, window_covers_prefix: bool = False, softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [..., Dv] with q's layout, lse [B, H, T] or packed [H, N])."""
    x = {
        "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_index": prefix_index,
        "prefix_lengths": prefix_lengths, "key_mask": key_mask, "key_lengths": key_lengths,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "sinks": sinks,
    }  # fmt: skip
    options = Options(max_seqlen_q, max_seqlen_k, scale, is_causal, window, window_covers_prefix, softcap, chunk)
    few = (q.shape[2] if max_seqlen_q is None or cu_seqlens_q is None else max_seqlen_q) <= MOST_QUERIES
    return _run(plan_decode if few else plan_forward, x, options)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    prefix_k: Tensor | None, prefix_v: Tensor | None, *, needs: tuple[bool, ...],
    prefix_index: Tensor | None = None, prefix_lengths: Tensor | None = None, key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, sinks: Tensor | None = None, scale: float,
    is_causal: bool, window: int | None = None, window_covers_prefix: bool = False, softcap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dv, dprefix_k, dprefix_v, dsinks); those not in `needs` are None and not computed."""
    x = {
        "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, "prefix_index": prefix_index,
        "prefix_lengths": prefix_lengths, "key_mask": key_mask, "key_lengths": key_lengths,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "sinks": sinks,
        "grad_out": grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(), "grad_lse": grad_lse, "out": out,
        "lse": lse,
    }  # fmt: skip
    options = Options(max_seqlen_q, max_seqlen_k, scale, is_causal, window, window_covers_prefix, softcap, chunk)
    return _run(plan_backward, x, options, tuple(needs))


def plan_backward(p: Problem, needs: tuple[bool, ...]) -> Plan:
    """At most four launches: Δ and lse, dq, the gradients of all keys and values, the sum of the prefix's parts."""
    wanted = [
        name
        for name, need in zip(GRADIENTS, needs, strict=True)
        if need and (name != "dsinks" or "sinks" in p.given) and ("prefix" not in name or p.P)
    ]
    memory = dict.fromkeys(("lse2", "delta"), contiguous((p.H, p.tokens)))
    steps = [*p.preparations(), plan_prepare(p)]
    if "dq" in wanted:
        memory["dq"] = p.like["q"]
        steps.append(plan_dq(p))
    if any(name in wanted for name in GRADIENTS[1:5]):
        more, grouping, launch = plan_dkv(p, wanted)
        memory |= more
        steps += [*grouping, launch, *plan_add_parts(p, memory)]
    if "dsinks" in wanted:
        steps.append(sink_gradient)
    return Plan(memory, steps, GRADIENTS)


def sink_gradient(x: Tensors) -> None:
    """−Σ exp(sink − lse)·Δ."""
    sinks = x["sinks"]
    x["dsinks"] = (
        -(torch.exp2(sinks.float()[:, None] * math.log2(math.e) - x["lse2"]) * x["delta"]).sum(1).to(sinks.dtype)
    )


def _run(make: Any, x: Tensors, options: Options, *more: Any) -> tuple[Any, ...]:
    """Run a call on the operands' device by the plan for its kind, which is made on first use."""
    q = x["q"]
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return _run(make, x, options, *more)
    return find_plan(make, x, options, more).run(x)
