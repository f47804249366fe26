"""Logits at selected positions only. Only newer transformers releases (none for Python 3.10) accept masks and per-row
positions, and not for every model; otherwise a hook on the head selects its input."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers.modeling_utils
from torch import Tensor

BY_TRANSFORMERS = hasattr(transformers.modeling_utils, "slice_logits_to_keep")


def by_model(base: Any) -> bool:
    """Whether the model itself supports the selection."""
    return BY_TRANSFORMERS and "logits_to_keep" in inspect.signature(base.forward).parameters


def taken_from(keywords: dict[str, Any], base: Any) -> Tensor | None:
    """Remove arguments that the model does not support from those of a forward."""
    kept = keywords.get("logits_to_keep")
    if not isinstance(kept, Tensor) or kept.dim() != 2 or by_model(base):
        return None
    return keywords.pop("logits_to_keep")


def chosen(hidden: Tensor, kept: Tensor) -> Tensor:
    """Select hidden states `[B, T, C]` by a mask `[B, T]`, giving `[n, C]`, or by positions `[B, U]`, giving `[B, U,
    C]`."""
    return hidden[kept] if kept.dtype == torch.bool else hidden.take_along_dim(kept[..., None], 1)
