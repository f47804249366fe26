"""The engine composed of torch's own kernels (backend "torch"): the default on CPUs, available on any device.

Attention is cut into pieces (`split`): some queries, the keys they see, at most a small mask. Each piece runs by itself
(`piece`) and is merged into the result so far by log-sum-exp:

    lse ← log(exp(lse) + exp(lse')),   out ← out + w·(out' − out),   w = exp(lse' − lse) = σ(lse' − lse_before)

The backward runs the same pieces with the merged out and lse, which makes each piece's gradient exact, and sums them.
The prefix is one piece for all the queries that share it, so it is read once and its gradient is summed inside the
kernel.

One query per row over one shared prefix, as in generation, takes a shorter path (`decode`), and so do calls so small
that copies cost less than operations (`small`).

Queries, out and lse are stored token by token, [N, H, ...], N = B·T in a dense call, so that a batch of queries that
share a prefix is a view, and so is each row.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from softkv import ranges
from softkv.ops.engine import Call, Gradients, Needs
from softkv.ops.torch import decode, piece, small
from softkv.ops.torch.geometry import Geometry, Piece
from softkv.ops.torch.split import plan_prefix, plan_tokens

_SMALLEST_SCALE = 1e-30  # times a score, this is still above 0 in float32
_FEW_QUERIES = 16
Bind = Callable[[Tensor | None, Tensor | None], Callable[[Tensor, Tensor, Tensor], Tensor]]
_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def forward(**call: Unpack[Call]) -> tuple[Tensor, Tensor]:
    with _own_precision(call["q"]):
        out, lse = _forward(call)
        if _hides(call) and not out.isfinite().all():
            out, lse = _forward(_seen(call))
        return out, lse


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    if small.serves(call) and _fused(call):
        return small.forward(call)
    q, prefix_k, prefix_v, scale = call["q"], call["prefix_k"], call["prefix_v"], call["scale"]
    if prefix_k is not None and prefix_v is not None and decode.serves(call):
        return decode.forward(q, call["k"], call["v"], prefix_k, prefix_v, call["key_mask"], scale)
    fused, width = _fused(call), call["v"].shape[-1]
    if fused:
        call = _of_one_width(call)
    geometry = Geometry(call, fused, backward=False)
    line, merged = geometry.line(call["q"]), _Merged(geometry)
    for keys, values, plan in _segments(geometry, call):
        for p in plan(geometry):
            operands = p.queries.of(line), p.keys(keys), p.keys(values), p.mask
            if fused:
                merged.add(p, *piece.fused_forward(*operands, p.causal, scale))
            else:
                merged.add(p, *piece.tiled_forward(*operands, scale, call["softcap"]))
    out, lse = merged.result(call["sinks"], call["v"].shape[-1])
    return geometry.unline(out[..., :width], q), geometry.unline_lse(lse)


def step(call: Call) -> Bind | None:
    """For further calls like this one of a decoding step, without gradients, alike but for the number of keys: what
    takes prefix_k and prefix_v and returns what gives out [B, 1, H, D] alone of q, k, v. None for other calls."""
    if not decode.serves_but_for_prefix(call) or _hides(call) or not _fused(call) or torch.is_autocast_enabled("cpu"):
        return None
    return decode.step(call)


def differentiable(call: Call) -> Callable[..., Tensor] | None:
    """For further calls like this small one: what gives out [B, T, H, D] alone, differentiable, of q, k, v, prefix_k
    and prefix_v, where packed rows are a batch of one line. None for other calls."""
    return small.differentiable(call) if _differentiates(call) else None


def with_gradients(call: Call) -> Tensor | None:
    """out alone, differentiable, of a small call whose tokens take gradients; None for others."""
    if not any(call[name].requires_grad for name in ("q", "k", "v")):
        return None  # in pieces: no backward over the tokens
    return small.with_gradients(call) if _differentiates(call) else None


def _differentiates(call: Call) -> bool:
    # Where a profile is taken, the general way names its backward.
    plain = not torch.is_autocast_enabled("cpu") and ranges.current() is None
    return plain and call["q"].numel() > 0 and small.serves(call) and _fused(call)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *, needs: Needs, **call: Unpack[Call]
) -> Gradients:
    with _own_precision(call["q"]):
        return _backward(grad_out, grad_lse, out, lse, needs, call)


def _own_precision(q: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast, which would lower the precision chosen here."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: Needs, call: Call
) -> Gradients:
    of_prefix_alone = not (needs.q or needs.k or needs.v)  # in pieces: no backward over the tokens
    if grad_lse is None and not of_prefix_alone and small.serves(call) and _fused(call):
        return small.backward(grad_out, out, lse, needs, call)
    scale, softcap, sinks, q = call["scale"], call["softcap"], call["sinks"], call["q"]
    if _hides(call) and not all(x.sum().isfinite() for x in _keys_and_values(call)):
        call = _seen(call)
    D, Dv = call["k"].shape[-1], call["v"].shape[-1]
    fused = grad_lse is None and _fused(call)
    if fused:
        call = _of_one_width(call)
        if Dv < D:
            grad_out, out = F.pad(grad_out, (0, D - Dv)), F.pad(out, (0, D - Dv))
    geometry = Geometry(call, fused, backward=True)
    line, grad, merged = geometry.line(call["q"]), geometry.line(grad_out), geometry.line(out)
    denominator = geometry.line_lse(lse)
    delta = None
    if not fused or needs.sinks:
        delta = (grad.to(lse.dtype) * merged).sum(-1)
        if grad_lse is not None:
            delta -= geometry.line_lse(grad_lse)
    # A query that sees nothing: exp(−∞ − 0) = 0, not exp(−∞ + ∞).
    denominator = denominator.masked_fill(denominator == float("-inf"), 0)
    dsinks = None
    if sinks is not None and delta is not None and needs.sinks:
        dsinks = -((sinks - denominator).exp() * delta).sum(0).to(sinks.dtype)

    dq = _Sum(line) if needs.q else None
    sums: list[_Sum | None] = []
    for keys, values, plan in _segments(geometry, call):
        need_k, need_v = (needs.prefix_k, needs.prefix_v) if plan is plan_prefix else (needs.k, needs.v)
        dk, dv = _Sum(keys) if need_k else None, _Sum(values) if need_v else None
        sums = [dk, dv, *sums]
        if dq is None and dk is None and dv is None:
            continue
        # The longest tile is last and covers every key: start with it and add the others.
        for p in reversed(plan(geometry)):
            at = p.queries.of
            operands = at(grad), at(line), p.keys(keys), p.keys(values)
            if delta is None or fused:
                parts = piece.fused_backward(*operands, at(merged), at(denominator), p.mask, p.causal, scale)
            else:
                parts = piece.tiled_backward(*operands, at(delta), at(denominator), p.mask, scale, softcap)
            if dq is not None:
                dq.add_queries(p, parts[0])
            if dk is not None:
                dk.add_keys(p, parts[1])
            if dv is not None:
                dv.add_keys(p, parts[2])
            del parts  # or they would stay alive together with the next ones
    dk_tokens, dv_tokens, dk_prefix, dv_prefix = [*sums, None, None][:4]
    return (
        None if dq is None else geometry.unline(dq.result()[..., :D], q),
        None if dk_tokens is None else geometry.unkeys(dk_tokens.result()[..., :D]),
        None if dv_tokens is None else geometry.unkeys(dv_tokens.result()[..., :Dv]),
        None if dk_prefix is None else dk_prefix.result()[..., :D],
        None if dv_prefix is None else dv_prefix.result()[..., :Dv],
        dsinks,
    )


def _hides(call: Call) -> bool:
    return call["key_mask"] is not None or call["key_lengths"] is not None or call["prefix_lengths"] is not None


def _keys_and_values(call: Call) -> list[Tensor]:
    return [x for x in (call["k"], call["v"], call["prefix_k"], call["prefix_v"]) if x is not None]


def _seen(call: Call) -> Call:
    """The call with 0 at keys and slots hidden from every query: they may contain NaN or ∞, which a mask multiplies by
    0 but does not remove. This copies, so it is done only if they do."""
    k, v, prefix_k, prefix_v = call["k"], call["v"], call["prefix_k"], call["prefix_v"]
    mask, lengths = call["key_mask"], call["key_lengths"]
    hidden = None if mask is None else ~mask
    if lengths is not None:
        past = torch.arange(k.shape[-2], device=k.device) >= lengths[:, None]
        hidden = past if hidden is None else hidden | past
    if hidden is not None:
        k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
    lengths = call["prefix_lengths"]
    if lengths is not None and prefix_k is not None and prefix_v is not None:
        past = (torch.arange(prefix_k.shape[2], device=k.device) >= lengths[:, None])[:, None, :, None]
        prefix_k, prefix_v = prefix_k.masked_fill(past, 0), prefix_v.masked_fill(past, 0)
    return {**call, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}


def _fused(call: Call) -> bool:
    """Whether torch's fused kernel supports the call. Its causal mask is −∞ before scaling, which gives NaN or +∞
    unless scale > 0."""
    q, v = call["q"], call["v"]
    if not q.is_cpu or call["softcap"] is not None or call["scale"] < _SMALLEST_SCALE:
        return False
    # It needs values as wide as keys: for a few queries the copies cost more than plain products.
    few = (q.shape[2] if q.dim() == 4 else call["max_seqlen_q"] or 0) <= _FEW_QUERIES
    return q.shape[-1] == v.shape[-1] or not few


def _of_one_width(call: Call) -> Call:
    """The call with queries, keys and values zero-padded to one width, which changes no score."""
    D, Dv = call["k"].shape[-1], call["v"].shape[-1]
    if Dv == D:
        return call
    prefix_k, prefix_v = call["prefix_k"], call["prefix_v"]
    if Dv < D:
        more = (0, D - Dv)
        return {**call, "v": F.pad(call["v"], more), "prefix_v": None if prefix_v is None else F.pad(prefix_v, more)}
    more = (0, Dv - D)
    return {
        **call, "q": F.pad(call["q"], more), "k": F.pad(call["k"], more),
        "prefix_k": None if prefix_k is None else F.pad(prefix_k, more),
    }  # fmt: skip


def _segments(geometry: Geometry, call: Call) -> Iterator[tuple[Tensor, Tensor, Any]]:
    if call["prefix_k"] is not None and call["prefix_v"] is not None:
        yield call["prefix_k"], call["prefix_v"], plan_prefix
    yield geometry.keys(call["k"]), geometry.keys(call["v"]), plan_tokens


class _Merged:
    """out [N, H, D] and lse [N, H] of the pieces so far, in at least float32."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.so_far: tuple[Tensor, Tensor] | None = None

    def add(self, p: Piece, out: Tensor, lse: Tensor) -> None:
        """out [rows, H, t, D], lse [rows, H, t]"""
        queries = p.queries
        out = out.to(self.geometry.wide)
        if p.blind is not None:
            lse = lse.masked_fill(p.blind, float("-inf"))
        if self.so_far is None:
            if queries.whole(self.geometry.N):
                self.so_far = queries.back(out), queries.back(lse)
                return
            self.so_far = self._nothing(out.shape[-1])
        outs, lses = self.so_far
        here, before = queries.of(outs), queries.of(lses)
        weight = (lse - before).sigmoid_()
        if p.blind is not None:
            weight.nan_to_num_(0)  # sees neither: −∞ − −∞; weight 0 keeps its 0
        here.lerp_(out, weight.unsqueeze(-1))
        torch.logaddexp(before, lse, out=before)
        if queries.index is not None:
            outs[queries.index], lses[queries.index] = queries.back(here), queries.back(before)

    def _nothing(self, width: int) -> tuple[Tensor, Tensor]:
        geometry = self.geometry
        out = torch.zeros(geometry.N, geometry.H, width, dtype=geometry.wide, device=geometry.device)
        return out, torch.full((geometry.N, geometry.H), float("-inf"), dtype=geometry.wide, device=geometry.device)

    def result(self, sinks: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
        out, lse = self.so_far or self._nothing(width)
        if sinks is None:
            return out, lse
        total = torch.logaddexp(lse, sinks.to(lse.dtype))
        weight = (lse - total).exp_().nan_to_num_(0)  # nothing visible and a sink of −∞: −∞ − −∞
        return out.mul_(weight.unsqueeze(-1)), total


class _Sum:
    """A gradient summed from pieces in at least float32; a first piece that covers everything is used without a
    copy."""

    def __init__(self, like: Tensor):
        self.like = like
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.total: Tensor | None = None

    def add_queries(self, p: Piece, part: Tensor) -> None:
        part = part.to(self.wide)
        if self.total is None:
            if p.queries.whole(self.like.shape[0]):
                self.total = p.queries.back(part)
                return
            self.total = torch.zeros_like(self.like, dtype=self.wide)
        if p.queries.index is None:
            p.queries.of(self.total).add_(part)
        else:
            self.total.index_add_(0, p.queries.index, p.queries.back(part))

    def add_keys(self, p: Piece, part: Tensor) -> None:
        part = part.to(self.wide)
        if p.key_rows.stop - p.key_rows.start < part.shape[0]:
            part = part.sum(0, keepdim=True)
        if self.total is None:
            if part.shape == self.like.shape:
                self.total = part
                return
            self.total = torch.zeros_like(self.like, dtype=self.wide)
        self.total[p.key_rows, :, p.s0 : p.s1] += part

    def result(self) -> Tensor:
        total = torch.zeros_like(self.like) if self.total is None else self.total
        return total.to(self.like.dtype)
