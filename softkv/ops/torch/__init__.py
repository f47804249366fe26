"""The engine composed of library kernels (backend "torch"): what the op runs on CPUs, and anywhere on request.

Attention is cut into pieces (`plan`): some queries, the keys they see, at most a small mask. Each piece runs by itself
(`piece`) and is merged into what stands there by log-sum-exp:

    lse ← log(exp(lse) + exp(lse')),   out ← out + w·(out' − out),   w = exp(lse' − lse) = σ(lse' − lse_before)

The backward runs the same pieces with the merged out and lse, which makes each piece's gradient exact, and adds up. The
prefix is one piece for all the queries that share it, so it is read once and its gradient is summed inside the kernel.

One query a row over one shared prefix, as in generation, goes a shorter way (`decode`).

Queries, out and lse are held token by token, [N, H, ...], N = B·T where the call is dense: a batch of queries that
share a prefix is then a view, and so is each row.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from softkv.ops.torch import decode, piece
from softkv.ops.torch.plan import Call, Piece, plan_prefix, plan_tokens


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _forward(q, k, v, prefix_k, prefix_v, options)
    if _hides(options) and not out.isfinite().all():
        out, lse = _forward(q, *_seen(k, v, prefix_k, prefix_v, options), options)
    return out, lse


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    scale, softcap = options["scale"], options["softcap"]
    if prefix_k is not None and prefix_v is not None and decode.serves(q, k, prefix_k, options):
        return decode.forward(q, k, v, prefix_k, prefix_v, options["key_mask"], scale)
    fused = _fused(q, scale, softcap)
    call = Call(q, k, prefix_k, options, fused, backward=False)
    line, merged = call.line(q), _Merged(call)
    for keys, values, plan in _segments(call, k, v, prefix_k, prefix_v):
        for p in plan(call):
            operands = p.queries.of(line), p.keys(keys), p.keys(values), p.mask
            if fused:
                merged.add(p, *piece.fused_forward(*operands, p.causal, scale))
            else:
                merged.add(p, *piece.tiled_forward(*operands, scale, softcap))
    out, lse = merged.result(options["sinks"])
    return call.unline(out, q), call.unline_lse(lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    *,
    needs: list[bool],
    **options: Any,
) -> tuple[Tensor | None, ...]:
    scale, softcap, sinks = options["scale"], options["softcap"], options["sinks"]
    if _hides(options) and not all(x.sum().isfinite() for x in (k, v, prefix_k, prefix_v) if x is not None):
        k, v, prefix_k, prefix_v = _seen(k, v, prefix_k, prefix_v, options)
    fused = _fused(q, scale, softcap) and grad_lse is None
    call = Call(q, k, prefix_k, options, fused, backward=True)
    line, grad, merged = call.line(q), call.line(grad_out), call.line(out)
    denominator = call.line_lse(lse)
    delta = None
    if not fused or needs[5]:
        delta = (grad.to(lse.dtype) * merged).sum(-1)
        if grad_lse is not None:
            delta -= call.line_lse(grad_lse)
    # A query that sees nothing: exp(−∞ − 0) = 0, not exp(−∞ + ∞).
    denominator = denominator.masked_fill(denominator == float("-inf"), 0)
    dsinks = None
    if needs[5]:
        dsinks = -((sinks - denominator).exp() * delta).sum(0).to(sinks.dtype)

    dq = _Sum(line) if needs[0] else None
    sums: list[_Sum | None] = []
    for keys, values, plan in _segments(call, k, v, prefix_k, prefix_v):
        first = 3 if plan is plan_prefix else 1
        dk, dv = _Sum(keys) if needs[first] else None, _Sum(values) if needs[first + 1] else None
        sums = [dk, dv, *sums]
        if dq is None and dk is None and dv is None:
            continue
        # The longest tile comes last and covers every key: taken first, the others are added to it.
        for p in reversed(plan(call)):
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
            del parts  # or they would stay alive beside the next ones
    of_tokens, of_prefix = sums[:2], sums[2:] or [None, None]
    return (
        None if dq is None else call.unline(dq.result(), q),
        *(None if x is None else call.unkeys(x.result()) for x in of_tokens),
        *(None if x is None else x.result() for x in of_prefix),
        dsinks,
    )


def _hides(options: dict[str, Any]) -> bool:
    return any(options[name] is not None for name in ("key_mask", "key_lengths", "prefix_lengths"))


def _seen(
    k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operands with 0 where keys or slots are hidden from every query: these may hold anything, and a mask
    multiplies it by 0, which NaN and ∞ survive. Copies, so only made where that shows."""
    mask, lengths = options["key_mask"], options["key_lengths"]
    hidden = None if mask is None else ~mask
    if lengths is not None:
        past = torch.arange(k.shape[-2], device=k.device) >= lengths[:, None]
        hidden = past if hidden is None else hidden | past
    if hidden is not None:
        k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))
    lengths = options["prefix_lengths"]
    if lengths is not None and prefix_k is not None and prefix_v is not None:
        past = (torch.arange(prefix_k.shape[2], device=k.device) >= lengths[:, None])[:, None, :, None]
        prefix_k, prefix_v = prefix_k.masked_fill(past, 0), prefix_v.masked_fill(past, 0)
    return k, v, prefix_k, prefix_v


def _fused(q: Tensor, scale: float, softcap: float | None) -> bool:
    """Whether the library's kernel serves: its causal mask is −∞ before the scale, so NaN or +∞ unless scale > 0."""
    return q.device.type == "cpu" and softcap is None and scale > 0


def _segments(
    call: Call, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    if prefix_k is not None and prefix_v is not None:
        yield prefix_k, prefix_v, plan_prefix
    yield call.keys(k), call.keys(v), plan_tokens


class _Merged:
    """out [N, H, D] and lse [N, H] of the pieces so far, in at least float32."""

    def __init__(self, call: Call):
        self.call = call
        self.so_far: tuple[Tensor, Tensor] | None = None

    def add(self, p: Piece, out: Tensor, lse: Tensor) -> None:
        """out [rows, H, t, D], lse [rows, H, t]"""
        queries = p.queries
        out = out.to(self.call.wide)
        if p.blind is not None:
            lse = lse.masked_fill(p.blind, float("-inf"))
        if self.so_far is None:
            if queries.whole(self.call.N):
                self.so_far = queries.back(out), queries.back(lse)
                return
            self.so_far = self._nothing()
        outs, lses = self.so_far
        here, before = queries.of(outs), queries.of(lses)
        weight = (lse - before).sigmoid_()
        if p.blind is not None:
            weight.nan_to_num_(0)  # blind to both: −∞ − −∞; weight 0 keeps its 0
        here.lerp_(out, weight.unsqueeze(-1))
        torch.logaddexp(before, lse, out=before)
        if queries.index is not None:
            outs[queries.index], lses[queries.index] = queries.back(here), queries.back(before)

    def _nothing(self) -> tuple[Tensor, Tensor]:
        call = self.call
        out = torch.zeros(call.N, *call.heads, dtype=call.wide, device=call.device)
        return out, torch.full((call.N, call.heads[0]), float("-inf"), dtype=call.wide, device=call.device)

    def result(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = self.so_far or self._nothing()
        if sinks is None:
            return out, lse
        total = torch.logaddexp(lse, sinks.to(lse.dtype))
        weight = (lse - total).exp_().nan_to_num_(0)  # nothing seen and a sink of −∞: −∞ − −∞
        return out.mul_(weight.unsqueeze(-1)), total


class _Sum:
    """A gradient added up from pieces, in at least float32; a first piece that covers everything is taken as it is."""

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
