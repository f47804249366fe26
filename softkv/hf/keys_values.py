"""The K/V of tokens as attention sees them, which may differ from those in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from softkv.evaluation import in_evaluation
from softkv.hf.frozen import BaseState, UnsupportedAttention
from softkv.hf.hooks import DecoderHooks


@torch.no_grad()
def keys_and_values(model: Any, *, standing_in: bool, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """K `[A, G, P, D]` and V `[A, G, P, Dv]` of every attention block in a run of the bare model.

    Args:
        model: a transformers model that softkv can be attached to.
        standing_in: whether they must be equivalent to the tokens in front of a row.
        **inputs: `input_ids` `[A, P]` or `inputs_embeds` `[A, P, C]`.

    Raises:
        ValueError: if softkv can't replace the model's attention, or K/V alone can't represent its tokens.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"a text in front needs a causal decoder, {type(model).__name__} is an encoder-decoder, whose encoder sees "
            'what follows: expected PTuningV2(init="text"), or the text in the rows'
        )
    hooks = DecoderHooks(model, None)
    try:
        try:
            BaseState.freeze(model, hooks)
            hooks.register()
            hooks.probe()
        except UnsupportedAttention as reason:
            own = hooks.fall_back(reason)
            if own.carrier is None:
                raise
        if standing_in and not hooks.carries:
            raise ValueError(
                f"{type(model).__name__} looks at other tokens beside causal attention (by states or convolutions, or "
                "in both directions), so K/V alone can't stand for a text in front: put the text into the rows"
            )
        blocks = hooks.capture(in_evaluation(hooks.decoder), **inputs)
    finally:
        hooks.remove()
        BaseState.release(model, hooks)
    keys, values = [block.key for block in blocks], [block.value for block in blocks]
    if hooks.parallel is not None:
        keys, values = [hooks.parallel.whole(key) for key in keys], [hooks.parallel.whole(value) for value in values]
    return keys, values
