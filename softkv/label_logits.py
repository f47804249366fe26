"""Logits only where a label is: a vocabulary is wide, and in a prompt no logit is looked at."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from softkv.hf.rows import IGNORED, Lines, rows_of


def label_logits(model: Any, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model's output for a batch, with the logits that predict a label and no others.

    Args:
        model: a `SoftModel`, or what wraps one.
        batch: `input_ids` and `labels` `[B, T]` with a padding mask, or packed `[1, N]` as a collator gives them.

    Returns:
        (output, targets): `output.logits` `[n, V]` in row order, and the n labels that they predict.
    """
    labels = batch["labels"]
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]  # logits[:, t] predicts token t + 1
    keep = targets != IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs, prompt_lengths=prompt_lengths(batch), logits_to_keep=keep, use_cache=False)
    return output, targets[keep]


def prompt_lengths(batch: dict[str, Any]) -> Tensor:
    """`[R]`: the number of tokens of each row before its first label."""
    tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    shape = (tokens.shape[0], tokens.shape[1])
    mask = batch.get("attention_mask")
    rows = rows_of(shape, mask, batch.get("position_ids"), batch.get("cu_seq_lens_q"), batch.get("max_length_q"))
    lines = Lines.of(shape, mask, rows, tokens.device)
    return lines.split(batch["labels"], None) - lines.first
