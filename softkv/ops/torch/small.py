"""Small calls in one piece, with prefix and tokens concatenated.

Up to some thousand values, copying keys and values costs less than a second library call and a merge, and the extra
memory is negligible. Larger calls keep the prefix a separate operand.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from softkv import ranges
from softkv.ops.engine import NO_DOUBLE_BACKWARD, Call, Gradients, Needs
from softkv.ops.torch import piece

MOST = 1 << 14  # values in the copy of the keys, and scores of packed rows, including those between rows
_LEFT_TO_PLANS = ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "window", "chunk", "sinks", "softcap")


def serves(call: Call) -> bool:
    """Whether a call that the fused kernel supports is small, and one mask describes what is visible."""
    q, k, prefix_k = call["q"], call["k"], call["prefix_k"]
    if any(call[name] is not None for name in _LEFT_TO_PLANS):  # type: ignore[literal-required]
        return False
    if prefix_k is None or prefix_k.shape[0] != 1 or call["v"].shape[-1] != q.shape[-1]:
        return False
    if k.dim() == 4:
        return fits(k, prefix_k)
    N, cu_seqlens = q.shape[0], call["cu_seqlens_q"]
    same = cu_seqlens is call["cu_seqlens_k"]
    return same and k.shape[0] == N and N * (N + prefix_k.shape[2]) <= MOST >= k.numel() + prefix_k.numel()


def fits(k: Tensor, prefix_k: Tensor) -> bool:
    """Whether a dense call has few keys."""
    return k.numel() + k.shape[0] * prefix_k.numel() <= MOST


def forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v = _batch(call["q"]), _batch(call["k"]), _batch(call["v"])
    keys, values = side_by_side(call["prefix_k"], k), side_by_side(call["prefix_v"], v)
    out, lse = piece.fused_forward(q, keys, values, _mask(call), False, call["scale"])
    return _like(call["q"], out), (lse if call["q"].dim() == 4 else lse[0]).contiguous()


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, call: Call) -> Gradients:
    q, k, v, grad_out, out = (_batch(x) for x in (call["q"], call["k"], call["v"], grad_out, out))
    keys, values = side_by_side(call["prefix_k"], k), side_by_side(call["prefix_v"], v)
    lse = lse if lse.dim() == 3 else lse[None]
    grads = piece.fused_backward(grad_out, q, keys, values, out, lse, _mask(call), False, call["scale"])
    P, packed = keys.shape[2] - k.shape[2], call["q"].dim() == 3
    return *_parted(grads, P, packed, (needs.q, needs.k, needs.v, needs.prefix_k, needs.prefix_v)), None


def with_gradients(call: Call) -> Tensor:
    """Differentiable out, without lse."""
    operands = call["q"], call["k"], call["v"], call["prefix_k"], call["prefix_v"]
    return cast(Tensor, _Small.apply(*operands, _mask(call), call["scale"]))


class _Small(torch.autograd.Function):
    """`forward` and `backward` with as little overhead as possible, because many small calls are host-bound."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        queries, keys, values = _batch(q), side_by_side(prefix_k, _batch(k)), side_by_side(prefix_v, _batch(v))
        out, lse = piece.flash(queries, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        ctx.save_for_backward(queries, keys, values, out, lse)
        ctx.options = mask, scale, prefix_k.shape[2], q.dim() == 3, ranges.current()
        return _like(q, out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        queries, keys, values, out, lse = ctx.saved_tensors
        mask, scale, P, packed, name = ctx.options
        with ranges.backward_of(name):
            grads = piece.fused_backward(_batch(grad_out), queries, keys, values, out, lse, mask, False, scale)
            parts = _parted(grads, P, packed, ctx.needs_input_grad)
        return *(_Once.apply(*parts) if torch.is_grad_enabled() else parts), None, None


class _Once(torch.autograd.Function):
    """Gradients that can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _parted(
    grads: tuple[Tensor, Tensor, Tensor], P: int, packed: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of queries, keys, values and the prefix's keys and values, from those of the concatenated tensors."""
    dq, dk, dv = grads
    return (
        _unbatch(dq, packed) if needs[0] else None,
        _unbatch(dk[:, :, P:], packed) if needs[1] else None,
        _unbatch(dv[:, :, P:], packed) if needs[2] else None,
        _of_slots(dk, P) if needs[3] else None,
        _of_slots(dv, P) if needs[4] else None,
    )


def _batch(x: Tensor) -> Tensor:
    """`[B, ., T, D]`; packed rows `[N, ., D]` become a single row."""
    return x if x.dim() == 4 else x.transpose(0, 1)[None]


def _unbatch(x: Tensor, packed: bool) -> Tensor:
    return x[0].transpose(0, 1) if packed else x


def _like(q: Tensor, out: Tensor) -> Tensor:
    """out `[B, H, T, D]` in the shape and layout of q."""
    out = _unbatch(out, q.dim() == 3)
    return out if out.stride() == q.stride() else torch.empty_like(q).copy_(out)


def side_by_side(prefix: Tensor | None, tokens: Tensor) -> Tensor:
    """`[B, G, P + S, D]`"""
    assert prefix is not None
    return torch.cat([prefix if len(tokens) == 1 else prefix.expand(len(tokens), -1, -1, -1), tokens], 2)


def _of_slots(grad: Tensor, P: int) -> Tensor:
    """The sum over rows, in order and in at least float32."""
    grad = grad[:, :, :P]
    if len(grad) == 1:
        return grad
    return grad.sum(0, keepdim=True, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


def _mask(call: Call) -> Tensor | None:
    q, k, prefix_k = call["q"], call["k"], call["prefix_k"]
    assert prefix_k is not None
    if q.dim() == 3:
        cu_seqlens = call["cu_seqlens_q"]
        assert cu_seqlens is not None
        return _apart(tuple(cu_seqlens.tolist()), prefix_k.shape[2], call["is_causal"], q.dtype)
    if not call["is_causal"] or q.shape[2] == 1:
        return None
    return _causal(q.shape[2], k.shape[2], prefix_k.shape[2], q.dtype)


# Masks depend on sizes only, so recently used ones are cached.


@lru_cache(maxsize=16)
def _causal(T: int, S: int, P: int, dtype: torch.dtype) -> Tensor:
    """`[T, P + S]`: 0 where a slot or a key up to S − T + t is seen, −∞ elsewhere."""
    with torch.inference_mode(False):
        mask = torch.full((T, P + S), float("-inf"), dtype=dtype, device="cpu").triu_(P + S - T + 1)
        mask[:, :P] = 0
        return mask


@lru_cache(maxsize=16)
def _apart(ends: tuple[int, ...], P: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """`[N, P + N]`: 0 where a slot or a key of the same row is seen, −∞ elsewhere."""
    with torch.inference_mode(False):
        mask = torch.full((ends[-1], P + ends[-1]), float("-inf"), dtype=dtype, device="cpu")
        mask[:, :P] = 0
        for start, stop in pairwise(ends):
            of_row = mask[start:stop, P + start : P + stop]
            of_row.triu_(1) if causal else of_row.zero_()
        return mask
