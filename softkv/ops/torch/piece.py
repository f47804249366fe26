"""Attention of one piece: queries [b, H, t, D] to keys and values [b, G, s, D], with an optional additive mask.

`fused_*` call torch's flash attention for CPUs. `tiled_*` are products and exponentials in tiles of queries: they run
on any device and support what the fused kernel does not, softcap and the gradient of lse.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# torch's own binding: the operator of `torch.ops` takes twice as long to call.
flash: Any = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_TILE_SCORES = 1 << 18  # 1 MB of float32
_FOLDED_QUERIES = 64  # up to here a copy of the queries costs less than reading keys once per head


def fused_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float):
    """(out [b, H, t, D], lse [b, H, t]); `causal` is aligned top-left."""
    H, G = q.shape[1], k.shape[1]
    alike = not causal and (mask is None or mask.shape[-2] == 1)
    if H == G or q.shape[2] > _FOLDED_QUERIES or not alike:
        return flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # Decoding: a group's heads form one block of queries, so its keys are read once.
    out, lse = flash(_group(q, G), k, v, 0.0, False, attn_mask=mask, scale=scale)
    return _ungroup(out, H), _ungroup(lse, H)


def fused_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool,
    scale: float,
):  # fmt: skip
    return _flash_backward(grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)


def tiled_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None):
    q, k, v = _wide(q), _wide(k), _wide(v)
    outs, lses = [], []
    for tile in _tiles(q, k):
        scores, _ = _scores(q[:, :, tile], k, _rows(mask, tile), scale, softcap)
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == float("-inf"), 0)
        p = scores.sub_(top).exp_()
        total = p.sum(-1, keepdim=True)
        out = torch.matmul(p, v).div_(total.clamp(min=torch.finfo(total.dtype).tiny))
        outs.append(_ungroup(out, q.shape[1]))
        lses.append(_ungroup(total.log_().add_(top), q.shape[1]).squeeze(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def tiled_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, mask: Tensor | None, scale: float,
    softcap: float | None,
):  # fmt: skip
    """delta [b, H, t] = Σ grad_out·out − grad_lse."""
    grad_out, q, k, v = _wide(grad_out), _wide(q), _wide(k), _wide(v)
    H, G = q.shape[1], k.shape[1]
    dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for tile in _tiles(q, k):
        scores, slope = _scores(q[:, :, tile], k, _rows(mask, tile), scale, softcap)
        p = scores.sub_(_group(lse[:, :, tile, None], G)).exp_()
        go = _group(grad_out[:, :, tile], G)
        dv += p.mT @ go
        ds = (go @ v.mT).sub_(_group(delta[:, :, tile, None], G)).mul_(p).mul_(scale)
        if slope is not None:
            ds *= slope
        dqs.append(_ungroup(ds @ k, H))
        dk += ds.mT @ _group(q[:, :, tile], G)
    return torch.cat(dqs, 2), dk, dv


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    t = q.shape[2]
    size = max(16, _TILE_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, t, size):
        yield slice(start, min(t, start + size))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None):
    """Scores [b, G, R·t, s] of grouped heads, and with a softcap their slope."""
    G, slope = k.shape[1], None
    scores = torch.matmul(_group(q, G), k.mT).mul_(scale)
    if softcap is not None:
        slope = scores.div_(softcap).tanh_().square().neg_().add_(1)
        scores *= softcap
    if mask is not None:
        scores.unflatten(2, (q.shape[1] // G, -1)).add_(mask.unsqueeze(-3))
    return scores, slope


def _rows(mask: Tensor | None, tile: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., tile, :]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _group(x: Tensor, G: int) -> Tensor:
    """[b, H, t, d] → [b, G, R·t, d]"""
    return x.unflatten(1, (G, -1)).flatten(2, 3)


def _ungroup(x: Tensor, H: int) -> Tensor:
    """[b, G, R·t, d] → [b, H, t, d]"""
    return x.unflatten(2, (H // x.shape[1], -1)).flatten(1, 2)
