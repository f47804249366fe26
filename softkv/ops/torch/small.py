"""Small calls in one piece, with prefix and tokens concatenated.

Up to some thousand values, copying keys and values costs less than a second library call and a merge, and the extra
memory is negligible. Larger calls keep the prefix a separate operand.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.ops.engine import NO_DOUBLE_BACKWARD, Call, Gradients, Needs
from softkv.ops.torch import piece

MOST = 1 << 14  # numbers in the copy of the keys, and scores of packed rows, which see each other's
# The library's kernel takes exponentials of so many keys at once, and of a rest one by one: masks cover whole lanes.
_LANES = 16
_LEFT_TO_PLANS = ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "window", "chunk", "sinks", "softcap")


def serves(call: Call) -> bool:
    """Whether a call that the fused kernel supports is small, and one mask describes what is visible."""
    q, k, prefix_k = call["q"], call["k"], call["prefix_k"]
    if any(call[name] is not None for name in _LEFT_TO_PLANS):  # type: ignore[literal-required]
        return False
    if prefix_k is None or call["v"].shape[-1] != q.shape[-1]:
        return False
    if k.dim() == 4:
        return fits(k, prefix_k)
    N, cu_seqlens = q.shape[0], call["cu_seqlens_q"]
    same = cu_seqlens is call["cu_seqlens_k"] and prefix_k.shape[0] == 1
    return same and k.shape[0] == N and N * (N + prefix_k.shape[2]) <= MOST >= k.numel() + prefix_k.numel()


def fits(k: Tensor, prefix_k: Tensor) -> bool:
    """Whether the keys of a dense call, with a prefix for all rows or for each, are few."""
    return k.numel() + len(k) // len(prefix_k) * prefix_k.numel() <= MOST


def copies_prefixes(B: int, S: int, G: int, P: int, D: int) -> bool:
    """Whether the keys of a dense call with prefixes of P slots are few."""
    return B * G * (P + S) * D <= MOST


def forward(call: Call) -> tuple[Tensor, Tensor]:
    mask = _mask(call)
    keys, values = side_by_side(call["prefix_k"], call["k"], mask), side_by_side(call["prefix_v"], call["v"], mask)
    out, lse = piece.fused_forward(_batch(call["q"]), keys, values, mask, False, call["scale"])
    return _like(call["q"], out), (lse if call["q"].dim() == 4 else lse[0]).contiguous()


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, call: Call) -> Gradients:
    mask, packed, prefix_k = _mask(call), call["q"].dim() == 3, call["prefix_k"]
    assert prefix_k is not None
    keys, values = side_by_side(prefix_k, call["k"], mask), side_by_side(call["prefix_v"], call["v"], mask)
    lse = lse[None] if packed else lse
    q, grad_out, out = (_batch(x) for x in (call["q"], grad_out, out))
    grads = piece.fused_backward(grad_out, q, keys, values, out, lse, mask, False, call["scale"])
    P, S = prefix_k.shape[2], _batch(call["k"]).shape[2]
    return *_parted(grads, P, S, packed, len(prefix_k) == 1, needs), None


def with_gradients(call: Call) -> Tensor:
    """out alone, differentiable, in q's shape."""
    q, k, v = (x if x.dim() == 4 else _batch(x) for x in (call["q"], call["k"], call["v"]))
    out = _attend(q, k, v, call["prefix_k"], call["prefix_v"], len(q), _mask(call), call["scale"])
    if out.grad_fn is not None:
        out.grad_fn.register_hook(_once)
    return _unbatch(out, call["q"].dim() == 3)


def differentiable(call: Call) -> Callable[..., Tensor]:
    """What gives out [B, T, H, D] alone, of q, k, v, prefix_k, prefix_v, in calls like this one, by operations that
    torch differentiates by itself: small calls are many, and wait for the host. Packed rows are a batch of one line."""
    mask, scale, rows = _mask(call), call["scale"], len(call["q"]) if call["q"].dim() == 4 else 1

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        return _attend(q, k, v, prefix_k, prefix_v, rows, mask, scale).transpose(1, 2)

    return attend


def _attend(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, rows: int, mask: Tensor | None, scale: float
) -> Tensor:
    keys, values = _beside(prefix_k, k, rows, mask), _beside(prefix_v, v, rows, mask)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)


def _once(grads: Sequence[Tensor | None], _: Any) -> Sequence[Tensor | None] | None:
    return _Once.apply(*grads) if torch.is_grad_enabled() else None


class _Once(torch.autograd.Function):
    """Gradients that can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(NO_DOUBLE_BACKWARD)


def _parted(
    grads: tuple[Tensor, Tensor, Tensor], P: int, S: int, packed: bool, shared: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of queries, keys, values and the prefix's keys and values, from those of the concatenated tensors."""
    dq, dk, dv = grads
    of_slots = _of_slots if shared else Tensor.contiguous
    return (
        _unbatch(dq, packed) if needs[0] else None,
        _unbatch(dk[:, :, P : P + S], packed) if needs[1] else None,
        _unbatch(dv[:, :, P : P + S], packed) if needs[2] else None,
        of_slots(dk[:, :, :P]) if needs[3] else None,
        of_slots(dv[:, :, :P]) if needs[4] else None,
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


def side_by_side(prefix: Tensor | None, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, G, P + S, D]`, and behind a mask the rest that it is made for."""
    assert prefix is not None
    tokens = _batch(tokens)
    return _beside(prefix, tokens, len(tokens), mask)


def _beside(prefix: Tensor, tokens: Tensor, rows: int, mask: Tensor | None) -> Tensor:
    if len(prefix) != rows:
        prefix = prefix.expand(rows, -1, -1, -1)
    if mask is None:
        return torch.cat((prefix, tokens), 2)
    (B, G, S, D), P = tokens.shape, prefix.shape[2]
    return torch.cat((prefix, tokens, _nothing((B, G, mask.shape[1] - P - S, D), tokens.dtype)), 2)


def _of_slots(grad: Tensor) -> Tensor:
    """The sum over rows, in at least float32 and in their order."""
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


# These follow from numbers alone: kept, a few of those that are asked for again and again.


@lru_cache(maxsize=16)
def _causal(T: int, S: int, P: int, dtype: torch.dtype) -> Tensor:
    """`[T, P + S + rest]`: 0 where a slot or a key up to S − T + t is seen, −∞ elsewhere."""
    mask = _hidden(T, P + S, dtype)
    mask.triu_(P + S - T + 1)[:, :P] = 0
    return mask


@lru_cache(maxsize=16)
def _apart(ends: tuple[int, ...], P: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """`[N, P + N + rest]`: 0 where a slot or a key of the same row is seen, −∞ elsewhere."""
    mask = _hidden(ends[-1], P + ends[-1], dtype)
    mask[:, :P] = 0
    for start, stop in pairwise(ends):
        of_row = mask[start:stop, P + start : P + stop]
        of_row.triu_(1) if causal else of_row.zero_()
    return mask


def _hidden(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((queries, keys + -keys % _LANES), float("-inf"), dtype=dtype, device="cpu")


@lru_cache(maxsize=16)
def _nothing(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device="cpu").expand(shape)
