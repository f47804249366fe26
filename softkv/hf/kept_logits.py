"""Logits of chosen positions alone. transformers takes masks and positions of each row's own only in its newer releases
(none of them for Python 3.10), and not for every model; else a hook on the head chooses what reaches it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor

BY_TRANSFORMERS = hasattr(transformers.modeling_utils, "slice_logits_to_keep")


def by_model(base: Any) -> bool:
    """Whether the model itself keeps what is asked for."""
    return BY_TRANSFORMERS and "logits_to_keep" in inspect.signature(base.forward).parameters


def taken_from(keywords: dict[str, Any], base: Any) -> Tensor | None:
    """Takes out of a forward's arguments what the model has no meaning for."""
    kept = keywords.get("logits_to_keep")
    if not isinstance(kept, Tensor) or kept.dim() != 2 or by_model(base):
        return None
    return keywords.pop("logits_to_keep")


def chosen(hidden: Tensor, kept: Tensor) -> Tensor:
    """Hidden states `[B, T, C]` of a mask `[B, T]`, as `[n, C]`, or of positions `[B, U]`, as `[B, U, C]`."""
    return hidden[kept] if kept.dtype == torch.bool else hidden.take_along_dim(kept[..., None], 1)
