"""Triton kernels of softkv: attention over a prefix that is never copied, and over tokens; forward, backward, decoding.

`forward` and `backward` are the engine behind `softkv.prefix_attention(..., backend="triton")`. Arguments are trusted: the
public op checks them. Nothing here waits for the device, and every launch depends on shapes alone, so a call can be captured
in a CUDA graph. Axes as in `softkv.prefix_attention`.
"""

from typing import Any

import torch
from torch import Tensor

from softkv.kernels.backward import run_backward
from softkv.kernels.decode import MOST_QUERIES, run_decode
from softkv.kernels.forward import run_forward
from softkv.kernels.launch import interpreter_enabled
from softkv.kernels.problem import Problem

__all__ = ["DTYPES", "backward", "forward", "interpreter_enabled"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEAD_DIM = 256


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """(out like q, lse [B, H, T] or packed [H, N])."""
    if options.pop("chunk", None) is not None:
        raise NotImplementedError("backend 'triton': expected no chunk, which its kernels do not take")
    if v.shape[-1] != q.shape[-1]:
        raise NotImplementedError(
            f"backend 'triton': expected values as wide as keys, D = {q.shape[-1]}, got Dv = {v.shape[-1]}"
        )
    if q.dtype not in DTYPES or q.shape[-1] > MOST_HEAD_DIM:
        wanted = f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)} and D ≤ {MOST_HEAD_DIM}"
        raise NotImplementedError(f"backend 'triton': expected {wanted}, got {q.dtype} and D = {q.shape[-1]}")
    problem = Problem.of(q, k, v, prefix_k, prefix_v, **options)
    return run_decode(problem) if problem.T_max <= MOST_QUERIES else run_forward(problem)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    prefix_k: Tensor | None, prefix_v: Tensor | None, *, needs: tuple[bool, ...], **options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dv, dprefix_k, dprefix_v, dsinks); what `needs` doesn't ask for is None and costs nothing."""
    options.pop("chunk", None)
    problem = Problem.of(q, k, v, prefix_k, prefix_v, **options)
    return run_backward(problem, grad_out, grad_lse, out, lse, needs)
