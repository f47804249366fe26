"""The engine composed of library kernels (backend "torch"): what the op runs on CPUs, and anywhere on request.

Attention is cut into pieces (`plan`): some queries, the keys they see, at most a small mask. Each piece runs by itself
(`piece`) and is merged into what stands there by log-sum-exp:

    lse ← log(exp(lse) + exp(lse')),   out ← out + w·(out' − out),   w = exp(lse' − lse) = σ(lse' − lse_before)

The backward runs the same pieces with the merged out and lse, which makes each piece's gradient exact, and adds up. The
prefix is one piece for all the queries that share it, so it is read once and its gradient is summed inside the kernel.

Queries, out and lse are held token by token, [N, H, ...], N = B·T where the call is dense: a batch of queries that
share a prefix is then a view, and so is each row.
"""

from typing import Any

import torch
from torch import Tensor

from softkv.cpu import piece
from softkv.cpu.plan import Call, Piece, plan_prefix, plan_tokens


def forward(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None, prefix_v: Tensor | None, **options: Any):
    fused = q.device.type == "cpu" and options["softcap"] is None
    call = Call(q, k, prefix_k, options, fused, chunks=1)
    line, merged = call.line(q), _Merged(q, call)
    for keys, values, pieces in (
        (prefix_k, prefix_v, plan_prefix(call)),
        (call.keys(k), call.keys(v), plan_tokens(call)),
    ):
        for p in pieces:
            operands = p.queries.of(line), p.keys(keys), p.keys(values), p.mask
            if fused:
                out, lse = piece.fused_forward(*operands, p.causal, options["scale"])
            else:
                out, lse = piece.tiled_forward(*operands, options["scale"], options["softcap"])
            merged.add(p, out, lse)
    return merged.result(options["sinks"])


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
    fused = q.device.type == "cpu" and options["softcap"] is None and grad_lse is None
    call = Call(q, k, prefix_k, options, fused, chunks=4 if fused else 1)
    line, grad, seen = call.line(q), call.line(grad_out), call.line(out)
    # A query that sees nothing: exp(−∞ − 0) = 0, not exp(−∞ + ∞).
    denominator = call.line(lse.masked_fill(lse == float("-inf"), 0), heads_first=True)
    sinks, delta = options["sinks"], None
    if not fused or needs[5]:
        delta = (grad.to(lse.dtype) * seen).sum(-1)
        if grad_lse is not None:
            delta -= call.line(grad_lse, heads_first=True)

    dq = _Sum(line) if needs[0] else None
    sums = [dq]
    for keys, values, pieces, wanted in (
        (prefix_k, prefix_v, plan_prefix, needs[3:5]),
        (call.keys(k), call.keys(v), plan_tokens, needs[1:3]),
    ):
        dk, dv = (_Sum(x) if need else None for x, need in zip((keys, values), wanted, strict=True))
        sums += [dk, dv]
        if not (dq or dk or dv):
            continue
        # The longest tile comes last and covers every key: taken first, the others are added to it.
        for p in reversed(pieces(call)):
            at = p.queries.of
            operands = at(grad), at(line), p.keys(keys), p.keys(values)
            if fused:
                parts = piece.fused_backward(*operands, at(seen), at(denominator), p.mask, p.causal, options["scale"])
            else:
                parts = piece.tiled_backward(
                    *operands, at(delta), at(denominator), p.mask, options["scale"], options["softcap"]
                )
            if dq:
                dq.add_queries(p, parts[0])
            if dk:
                dk.add_keys(p, parts[1])
            if dv:
                dv.add_keys(p, parts[2])
    dsinks = None
    if needs[5]:
        dsinks = -((sinks - call.line(lse, heads_first=True)).exp() * delta).sum(0).to(sinks.dtype)
    dq_line, dprefix_k, dprefix_v, dk_all, dv_all = (x.result() if x else None for x in sums)
    return (
        None if dq_line is None else call.unline(dq_line, q),
        None if dk_all is None else call.unkeys(dk_all, k),
        None if dv_all is None else call.unkeys(dv_all, v),
        dprefix_k,
        dprefix_v,
        dsinks,
    )


class _Merged:
    """out [N, H, D] and lse [N, H] of the pieces so far, in at least float32."""

    def __init__(self, q: Tensor, call: Call):
        self.q, self.call = q, call
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, p: Piece, out: Tensor, lse: Tensor) -> None:
        """out [rows, H, t, D], lse [rows, H, t]"""
        if p.blind is not None:
            lse = lse.masked_fill(p.blind, float("-inf"))
        queries, N = p.queries, self.call.N
        if self.out is None or self.lse is None:
            if queries.whole(N):
                self.out, self.lse = queries.back(out).to(self.wide), queries.back(lse)
                return
            self._nothing_seen()
        here, before = queries.of(self.out), queries.of(self.lse)
        # A query blind to both: −∞ − −∞ is NaN, and weight 0 keeps its 0.
        weight = (lse - before).sigmoid_().nan_to_num_(0)
        here.lerp_(out.to(self.wide), weight.unsqueeze(-1))
        torch.logaddexp(before, lse, out=before)
        if queries.index is not None:
            self.out[queries.index], self.lse[queries.index] = queries.back(here), queries.back(before)

    def _nothing_seen(self) -> None:
        self.out = self.q.new_zeros(self.call.N, *self.call.heads, dtype=self.wide)
        self.lse = self.q.new_full((self.call.N, self.call.heads[0]), float("-inf"), dtype=self.wide)

    def result(self, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.out is None or self.lse is None:
            self._nothing_seen()
        if sinks is not None:
            before = self.lse
            self.lse = torch.logaddexp(before, sinks.to(self.wide))
            self.out.mul_((before - self.lse).exp_().unsqueeze(-1))
        return self.call.unline(self.out, self.q), self.call.unline_lse(self.lse)


class _Sum:
    """A gradient added up from pieces, in at least float32; a first piece that covers everything is taken as it is."""

    def __init__(self, like: Tensor):
        self.like = like
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.total: Tensor | None = None

    def add_queries(self, p: Piece, part: Tensor) -> None:
        if self.total is None:
            if p.queries.whole(self.like.shape[0]):
                self.total = p.queries.back(part).to(self.wide)
                return
            self.total = torch.zeros_like(self.like, dtype=self.wide)
        if p.queries.index is None:
            p.queries.of(self.total).add_(part)
        else:
            self.total.index_add_(0, p.queries.index, p.queries.back(part).to(self.wide))

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
