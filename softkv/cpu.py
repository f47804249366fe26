"""A first engine in torch: row by row, prefix and tokens apart, merged by log-sum-exp."""

import torch
from torch import Tensor


def _rows(q, k, cu_seqlens_q, cu_seqlens_k):
    if cu_seqlens_q is None:
        for b in range(q.shape[0]):
            yield (lambda x, b=b: x[b]), (lambda x, b=b: x[b]), (lambda x, b=b: x[b])
    else:
        sq, sk = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        for b in range(len(sq) - 1):
            a, z, c, y = sq[b], sq[b + 1], sk[b], sk[b + 1]
            yield (
                lambda x, a=a, z=z: x[a:z].transpose(0, 1),
                lambda x, c=c, y=y: x[c:y].transpose(0, 1),
                lambda x, a=a, z=z: x[:, a:z],
            )


def _segments(b, q, k, v, prefix_k, prefix_v, kw):
    """(keys [G,S,D], values, visible [T,S], prefix number or None)"""
    T, S = q.shape[1], k.shape[1]
    n = S if kw["key_lengths"] is None else int(kw["key_lengths"][b])
    pos = torch.arange(S)
    exists = pos < n
    if kw["key_mask"] is not None:
        exists = exists & kw["key_mask"][b]
    query = (n - T + torch.arange(T))[:, None]
    vis = exists.expand(T, S)
    if kw["is_causal"]:
        vis = vis & (pos <= query)
    if kw["window"] is not None:
        vis = vis & (pos > query - kw["window"])
    segs = [(k, v, vis, None)]
    if prefix_k is not None:
        A = prefix_k.shape[0]
        a = (b % A) if kw["prefix_index"] is None else int(kw["prefix_index"][b])
        if 0 <= a < A:
            P = prefix_k.shape[2] if kw["prefix_lengths"] is None else int(kw["prefix_lengths"][a])
            vis = torch.ones(T, P, dtype=torch.bool)
            if kw["window"] is not None and kw["window_covers_prefix"]:
                first = int(exists.int().argmax()) if S else 0
                vis = first - P + torch.arange(P) > query - kw["window"]
            segs.append((prefix_k[a, :, :P], prefix_v[a, :, :P], vis, a))
    return segs


def _scores(q, k, vis, scale, softcap):
    wide = torch.promote_types(q.dtype, torch.float32)
    s = q.to(wide) @ k.to(wide).repeat_interleave(q.shape[0] // k.shape[0], 0).mT * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~vis, float("-inf"))


def forward(q, k, v, prefix_k, prefix_v, **kw) -> tuple[Tensor, Tensor]:
    packed = kw["cu_seqlens_q"] is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = q.new_empty((q.shape[1], q.shape[0]) if packed else q.shape[:3], dtype=wide)
    for b, (rq, rk, rl) in enumerate(_rows(q, k, kw["cu_seqlens_q"], kw["cu_seqlens_k"])):
        qb = rq(q)
        segs = _segments(b, qb, rk(k), rk(v), prefix_k, prefix_v, kw)
        s = torch.cat([_scores(qb, kk, vis, kw["scale"], kw["softcap"]) for kk, _, vis, _ in segs], -1)
        vals = torch.cat([vv for _, vv, _, _ in segs], 1).to(wide).repeat_interleave(q.shape[-2 if packed else 1] // rk(k).shape[0], 0)
        row = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], float("-inf"))
        if kw["sinks"] is not None:
            row = torch.logaddexp(row, kw["sinks"].to(wide)[:, None])
        p = torch.exp(s - row[..., None]).masked_fill(row[..., None] == float("-inf"), 0)
        rq(out).copy_(p @ vals)
        rl(lse).copy_(row)
    return out, lse


def backward(grad_out, grad_lse, out, lse, q, k, v, prefix_k, prefix_v, *, needs, **kw):
    wide = lse.dtype
    grads = [torch.zeros_like(x, dtype=wide) if x is not None else None for x in (q, k, v, prefix_k, prefix_v, kw["sinks"])]
    dq, dk, dv, dpk, dpv, dsinks = grads
    for b, (rq, rk, rl) in enumerate(_rows(q, k, kw["cu_seqlens_q"], kw["cu_seqlens_k"])):
        qb, go, row = rq(q), rq(grad_out).to(wide), rl(lse)[..., None]
        G = rk(k).shape[0]
        delta = (go * rq(out).to(wide)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - rl(grad_lse)[..., None]
        for kk, vv, vis, a in _segments(b, qb, rk(k), rk(v), prefix_k, prefix_v, kw):
            s = _scores(qb, kk, vis, kw["scale"], kw["softcap"])
            p = torch.exp(s - row).masked_fill(row == float("-inf"), 0)
            R = qb.shape[0] // G
            ds = p * (go @ vv.to(wide).repeat_interleave(R, 0).mT - delta) * kw["scale"]
            if kw["softcap"] is not None:
                ds = ds * (1 - (s.masked_fill(~vis, 0) / kw["softcap"]) ** 2)
            rq(dq).add_(ds @ kk.to(wide).repeat_interleave(R, 0))
            gk = (ds.mT @ qb.to(wide)).unflatten(0, (G, R)).sum(1)
            gv = (p.mT @ go).unflatten(0, (G, R)).sum(1)
            if a is None:
                rk(dk).copy_(gk), rk(dv).copy_(gv)
            else:
                dpk[a, :, : kk.shape[1]] += gk
                dpv[a, :, : kk.shape[1]] += gv
        if dsinks is not None:
            w = torch.exp(kw["sinks"].to(wide)[:, None] - row[..., 0])
            dsinks -= (w * delta[..., 0]).sum(-1)
    like = (q, k, v, prefix_k, prefix_v, kw["sinks"])
    return tuple(g.to(x.dtype) if n and g is not None else None for g, x, n in zip(grads, like, needs))
