"""The ids of a vocabulary that are words, and those with a special meaning."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

_NAMES_IDS = re.compile(r"(_token_ids?|_token_index|suppress_tokens|_to_id|forced_decoder_ids)$")
_UNUSED = re.compile(r"[\[<].*(unused|reserved).*[\]>]", re.IGNORECASE)  # rows reserved by a tokenizer


def named_ids(config: Any) -> set[int]:
    """The ids with a special meaning in a config, its parts or a generation config: end tokens, padding, placeholders
    of images or audio."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= named_ids(value)
        elif _NAMES_IDS.search(name):
            found |= _integers(value)
    return found


def _integers(value: Any) -> set[int]:
    """The integers in a value, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return set().union(*map(_integers, value))
    return {value} if isinstance(value, int) and not isinstance(value, bool) else set()


def word_ids(model: Any, tokenizer: Any) -> Tensor:
    """The ids of a model's vocabulary that are words, in order: without special and added ones, those named in its
    configs and, given a tokenizer, rows that it does not use.

    Args:
        model: a transformers model.
        tokenizer: the model's, or None.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    named = named_ids(model.config)
    if getattr(model, "generation_config", None) is not None:
        named |= named_ids(model.generation_config)
    if tokenizer is None:
        words: set[int] = set(range(rows))
    else:
        words = {i for token, i in tokenizer.get_vocab().items() if i < rows and not _UNUSED.fullmatch(token)}
        named |= {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    return torch.tensor(sorted(words - named), dtype=torch.long)
