"""Causal models whose own loss compares each logit with the label of its own column (BART's decoders, Whisper's): their
labels must be shifted by the caller. A `SoftModel` takes the labels of the tokens themselves and computes the loss."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss


def has_column_loss(base: Any) -> bool:
    """Whether a causal model's own loss is of that kind."""
    code = getattr(inspect.unwrap(type(base).forward), "__code__", None)
    if code is None or "loss_function" in code.co_names or "CrossEntropyLoss" not in code.co_names:
        return False
    return not any("shift" in name for name in code.co_varnames)


def with_next_token_loss(output: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Any:
    """A base's output for `[B, T]` labels, with the loss of next tokens."""
    logits = output.logits
    loss = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)
    return type(output)(**{**output, "loss": loss})
