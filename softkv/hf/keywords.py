"""Keywords that reach attention through `**kwargs`: the model's own, which change what it computes, and the caller's,
which it only passes on."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

# Keywords that models pass on to attention without effect there.
HARMLESS = {
    "cache_position", "deterministic", "inputs_embeds", "input_ids", "labels", "logits_to_keep", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "return_dict", "seq_idx",
    "shift_labels", "token_type_ids", "tokenizer", "use_cache",
}  # fmt: skip


def check_understood(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse keywords that would change the attention of a module in ways that softkv does not support.

    Raises:
        ValueError: naming them.
    """
    given = [name for name, value in kwargs.items() if value is not None and name not in HARMLESS]
    unknown = sorted(name for name in given if _names(type(module).__module__, name))
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention, which softkv does not support: "
            'use attn_implementation="eager"'
        )


@torch.compiler.assume_constant_result
def _names(modeling: str, keyword: str) -> bool:
    """Whether the code of a model, including its eager attention, uses a keyword. Otherwise the keyword is the caller's
    (for a loss or a trainer), and the model only passes it on."""
    source = _source(modeling)
    return source is None or re.search(rf"\b{re.escape(keyword)}\b", source) is not None


@cache
def _source(modeling: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[modeling])
    except (OSError, TypeError, KeyError):
        return None
