"""Logits only where a label is: a vocabulary is wide, and in a prompt no logit is looked at."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from softkv.hf.layout import IGNORED, Lines, rows_of


def label_logits(model: Any, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    """The model's output for a batch, with the logits that predict a label and no others.

    Args:
        model: a `SoftModel`, or what wraps one.
        batch: `input_ids` and `labels` `[B, T]` with a padding mask, or packed `[1, N]` as a collator gives them;
            `prompt_lengths` `[R]` where a row's prompt doesn't end at its first label.

    Returns:
        (output, targets): `output.logits` `[n, V]` in row order, and the n labels that they predict.
    """
    batch = with_prompt_lengths(batch)
    targets = next_labels(batch.pop("labels"))
    keep = targets != IGNORED
    return model(**batch, logits_to_keep=keep, use_cache=False), targets[keep]


def next_labels(labels: Tensor) -> Tensor:
    """What each logit predicts, `[B, T]`: `logits[:, t]` predicts token t + 1."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def with_prompt_lengths(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `prompt_lengths` `[R]`: the number of tokens of each row before its first label, unless given.

    Nothing predicts a row's first token, so its label is dropped: in a padded batch as in a packed one.
    """
    tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
    shape, mask = (tokens.shape[0], tokens.shape[1]), batch.get("attention_mask")
    rows = rows_of(shape, mask, batch.get("position_ids"), batch.get("cu_seq_lens_q"), batch.get("max_length_q"))
    lines = Lines.of(shape, mask, rows, tokens.device)
    labels = batch["labels"].flatten().index_fill(0, lines.first[lines.first < lines.last], IGNORED).view(shape)
    lengths = batch.get("prompt_lengths")
    if lengths is None:
        lengths = lines.split(labels, None) - lines.first
    return batch | {"labels": labels, "prompt_lengths": lengths}
