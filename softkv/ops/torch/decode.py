"""One query per row and one prefix for all rows, as in every decoding step, with few operations besides the two library
calls.

A query sees every key its row has, so there is no causal mask. The query heads that share keys form one block: R = H/G
of a row for its tokens, B·R of all rows for the prefix, whose slots are thus read once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.ops.engine import Call
from softkv.ops.torch import piece, small

_HIDDEN = 0.9 * torch.finfo(torch.float32).max  # beyond any score
_LEFT_TO_PLANS = ("prefix_index", "prefix_lengths", "key_lengths", "window", "chunk", "sinks", "softcap")


def serves(call: Call) -> bool:
    return call["prefix_k"] is not None and serves_but_for_prefix(call)


def serves_but_for_prefix(call: Call) -> bool:
    """Whether a call is plain enough, but for a prefix that it may lack."""
    q, k, prefix_k = call["q"], call["k"], call["prefix_k"]
    return (
        q.dim() == 4
        and q.shape[2] == 1
        and k.shape[2] > 0
        and (prefix_k is None or prefix_k.shape[0] == 1)
        and call["v"].shape[3] == q.shape[3]
        and q.dtype in (torch.float32, torch.float64)
        and q.is_cpu
        and all(call[name] is None for name in _LEFT_TO_PLANS)  # type: ignore[literal-required]
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, H, 1, D] and lse [B, H, 1]."""
    mask = None
    if key_mask is not None:  # finite: a row of hidden keys gets an lse that any slot outweighs, not NaN
        mask = key_mask[:, None, None].to(q.dtype).sub_(1).mul_(_HIDDEN)
    out, lse, prefix_lse = _merged(q, k, v, prefix_k, prefix_v, mask, scale)
    return _like(q, out), torch.logaddexp(lse, prefix_lse).reshape(q.shape[0], q.shape[1], 1)


def step(call: Call) -> Callable[[Tensor | None, Tensor | None], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Of a call that `serves_but_for_prefix` and that hides nothing: what gives, of prefix_k and prefix_v, what gives
    out [B, 1, H, D] alone of q, k, v in further calls alike but for the number of keys."""
    (B, H, _, D), scale = call["q"].shape, call["scale"]

    def of_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)

    def bind(prefix_k: Tensor | None, prefix_v: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if prefix_k is None or prefix_v is None:
            return of_tokens
        few = small.MOST - B * prefix_k.numel()
        of_rows_k, of_rows_v = (x.expand(B, -1, -1, -1) for x in (prefix_k, prefix_v))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if k.numel() <= few:
                return of_tokens(q, torch.cat((of_rows_k, k), 2), torch.cat((of_rows_v, v), 2))
            out, _, _ = _merged(q, k, v, prefix_k, prefix_v, None, scale)
            return out.view(B, 1, H, D)

        return attend

    return bind


def _merged(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, G, R, D], and lse [B, G, R] of the tokens and of the prefix."""
    B, _, _, D = q.shape
    G = k.shape[1]
    rows = q.reshape(B, G, -1, D)
    out, lse = piece.flash(rows, k, v, 0.0, False, attn_mask=mask, scale=scale)
    whole = rows if B == 1 else rows.transpose(0, 1).reshape(1, G, -1, D)
    prefix_out, prefix_lse = piece.flash(whole, prefix_k, prefix_v, 0.0, False, scale=scale)  # [1, G, B·R, D]
    if B > 1:
        prefix_out = prefix_out.view(G, B, -1, D).transpose(0, 1)
        prefix_lse = prefix_lse.view(G, B, -1).transpose(0, 1)
    out.lerp_(prefix_out, torch.sub(prefix_lse, lse).sigmoid_().unsqueeze_(-1))
    return out, lse, prefix_lse


def _like(q: Tensor, out: Tensor) -> Tensor:
    """[B, G, R, D] in the shape and layout of q."""
    out = out.view(q.shape)
    if out.stride()[:2] == q.stride()[:2]:
        return out.as_strided(q.shape, q.stride())
    return torch.empty_like(q).copy_(out)
