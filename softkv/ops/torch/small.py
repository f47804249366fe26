"""Small calls in one piece, prefix and tokens side by side.

Up to some thousand numbers, copying keys and values costs less than a second library call and a merge. So little is
copied that nothing else notices; larger calls keep the prefix an operand of its own.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from softkv.ops.engine import Call, Gradients, Needs
from softkv.ops.torch import piece

MOST = 1 << 14  # numbers in the copy of the keys, and scores of packed rows, which see each other's
_LEFT_TO_PLANS = ("prefix_index", "prefix_lengths", "key_mask", "key_lengths", "window", "chunk", "sinks", "softcap")


def serves(call: Call) -> bool:
    """Whether a call that the library's kernel can take is small, and so plain that one mask says what is seen."""
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
    """Whether the keys of a dense call are few."""
    return k.numel() + k.shape[0] * prefix_k.numel() <= MOST


def forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v = _batch(call)
    keys, values = side_by_side(call["prefix_k"], k), side_by_side(call["prefix_v"], v)
    out, lse = piece.fused_forward(q, keys, values, _mask(call), False, call["scale"])
    if call["q"].dim() == 3:
        out, lse = out[0].transpose(0, 1), lse[0]
    if out.stride() != call["q"].stride():
        out = torch.empty_like(call["q"]).copy_(out)
    return out, lse.contiguous()


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, needs: Needs, call: Call) -> Gradients:
    q, k, v = _batch(call)
    keys, values = side_by_side(call["prefix_k"], k), side_by_side(call["prefix_v"], v)
    if call["q"].dim() == 3:
        grad_out, out, lse = grad_out.transpose(0, 1)[None], out.transpose(0, 1)[None], lse[None]
    dq, dk, dv = piece.fused_backward(grad_out, q, keys, values, out, lse, _mask(call), False, call["scale"])
    P = keys.shape[2] - k.shape[2]
    packed = call["q"].dim() == 3
    return (
        None if not needs.q else dq[0].transpose(0, 1) if packed else dq,
        _of_tokens(dk, P, packed) if needs.k else None,
        _of_tokens(dv, P, packed) if needs.v else None,
        _of_slots(dk, P) if needs.prefix_k else None,
        _of_slots(dv, P) if needs.prefix_v else None,
        None,
    )


def _batch(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, ., T or S, D]`; packed rows are one."""
    q, k, v = call["q"], call["k"], call["v"]
    if q.dim() == 4:
        return q, k, v
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def side_by_side(prefix: Tensor | None, tokens: Tensor) -> Tensor:
    """`[B, G, P + S, D]`"""
    assert prefix is not None
    return torch.cat([prefix if len(tokens) == 1 else prefix.expand(len(tokens), -1, -1, -1), tokens], 2)


def _of_tokens(grad: Tensor, P: int, packed: bool) -> Tensor:
    grad = grad[:, :, P:]
    return grad[0].transpose(0, 1) if packed else grad


def _of_slots(grad: Tensor, P: int) -> Tensor:
    """The sum over rows, in at least float32 and in their order."""
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


# Masks follow from numbers alone: kept, a few of those that are asked for again and again.


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
