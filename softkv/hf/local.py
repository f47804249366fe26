"""Local attention of bidirectional encoders (ModernBERT): a window on both sides of each token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softkv.ops.api import prefix_attention


def two_sided_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    is_causal: bool = False,
    sinks: Tensor | None = None,
    window_covers_prefix: bool = False,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix_index: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of each token to the prefix and to the tokens less than `window` positions away, on both sides.

    Two causal windows, one of them over the reversed row, merged by log-sum-exp. Arguments and shapes are those of
    `prefix_attention`, with T = S.
    """
    if is_causal or key_lengths is not None or query.shape[2] != key.shape[2]:
        raise ValueError("local attention on both sides expects a bidirectional model without a cache")
    before, lse_before = prefix_attention(
        query,
        key,
        value,
        prefix_k,
        prefix_v,
        prefix_lengths=prefix_lengths,
        prefix_index=prefix_index,
        key_mask=key_mask,
        window=window,
        window_covers_prefix=window_covers_prefix,
        sinks=sinks,
        return_lse=True,
        **options,
    )
    if window == 1 or query.shape[2] == 1:
        return before
    # In the reversed row, keys are delayed by one step, because a token has already seen itself.
    behind, lse_behind = prefix_attention(
        query.flip(2)[:, :, 1:],
        key.flip(2)[:, :, :-1],
        value.flip(2)[:, :, :-1],
        key_mask=None if key_mask is None else key_mask.flip(1)[:, :-1],
        window=window - 1,
        return_lse=True,
        **options,
    )
    behind = F.pad(behind.flip(2), (0, 0, 0, 1))
    lse_behind = F.pad(lse_behind.flip(2), (0, 1), value=float("-inf"))
    nothing = lse_behind.isneginf()
    share = torch.sigmoid(lse_before - lse_behind.masked_fill(nothing, 0)).masked_fill(nothing, 1)[..., None]
    return (before * share + behind * (1 - share)).to(before.dtype)
