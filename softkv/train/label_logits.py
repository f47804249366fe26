"""Computes logits only at labelled positions: vocabularies are large, and no loss reads a prompt's logits."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from softkv.hf.layout import IGNORED, with_prompt_lengths


def label_logits(model: Any, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    """Run the model on a batch and compute only the logits that predict a label.

    Args:
        model: a `SoftModel`, or a wrapper of one.
        batch: `input_ids` and `labels` `[B, T]` with a padding mask, or packed `[1, N]` as returned by a collator;
            `prompt_lengths` `[R]` if prompts don't end at the first label.

    Returns:
        (output, targets): `output.logits` `[n, V]` in row order, and the n labels to predict.
    """
    batch = with_prompt_lengths(batch)
    targets = next_labels(batch.pop("labels"))
    keep = targets != IGNORED
    return model(**batch, logits_to_keep=keep, use_cache=False), targets[keep]


def next_labels(labels: Tensor) -> Tensor:
    """The target of each logit, `[B, T]`: `logits[:, t]` predicts token t + 1."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def with_decoder_inputs(base: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of an encoder-decoder with the decoder's input ids instead of labels, from which the base would compute a
    loss. Labels are kept if only the base knows how to shift them."""
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    given = {name: value for name, value in batch.items() if name != "labels"}
    if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return given
    return batch if shift is None else given | {"decoder_input_ids": shift(labels=batch["labels"])}
