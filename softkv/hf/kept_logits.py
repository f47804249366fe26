"""Logits of chosen positions alone. transformers takes masks and positions of each row's own only in its newer releases
(none of them for Python 3.10); with an older one, a hook on the head chooses what reaches it."""

from __future__ import annotations

from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor

BY_TRANSFORMERS = hasattr(transformers.modeling_utils, "slice_logits_to_keep")


def taken_from(keywords: dict[str, Any]) -> Tensor | None:
    """Takes out of a forward's arguments what an older transformers has no meaning for."""
    kept = keywords.get("logits_to_keep")
    if BY_TRANSFORMERS or not isinstance(kept, Tensor) or kept.dim() != 2:
        return None
    return keywords.pop("logits_to_keep")


def chosen(hidden: Tensor, kept: Tensor) -> Tensor:
    """Hidden states `[B, T, C]` of a mask `[B, T]`, as `[n, C]`, or of positions `[B, U]`, as `[B, U, C]`."""
    return hidden[kept] if kept.dtype == torch.bool else hidden.take_along_dim(kept[..., None], 1)
