"""Activation checkpointing of a transformers model, under the installed transformers' names: those with `gradient_` are
older (the newest for Python 3.10), and removed in transformers 6."""

from __future__ import annotations

from typing import Any


def is_on(model: Any) -> bool:
    """Whether any module recomputes its activations in backward.

    Like `model.is_activation_checkpointing`, but ten times faster: it is asked in every training step.
    """
    modules, seen = [model], {None, model}
    for module in modules:
        if module.__dict__.get("gradient_checkpointing"):
            return True
        if module._modules:
            below = set(module._modules.values()) - seen
            seen |= below
            modules += below
    return False


def check_keeps_cache(decoder: Any, cache: Any) -> None:
    """Raise if a decoder would silently ignore a cache, as layers that are recomputed do in training mode."""
    if cache is not None and decoder.training and is_on(decoder):
        raise ValueError(
            "gradient checkpointing keeps no cache in training mode, so generate would see the last token alone: "
            "call eval() first, or give use_cache=False"
        )


def enable(model: Any, kwargs: dict[str, Any] | None = None, **options: Any) -> None:
    """Enable it; `kwargs` are those of `torch.utils.checkpoint.checkpoint`."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs, **options)
    else:
        model.gradient_checkpointing_enable(kwargs, **options)


def disable(model: Any) -> None:
    """Disable it."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
