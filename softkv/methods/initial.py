"""Initial values of learned parameters: random, sampled from the vocabulary, or from a text."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from softkv.methods.base import FrozenModel
from softkv.methods.template import leading_special_ids
from softkv.prefix import Prefix

Init = Literal["random", "vocabulary", "text"]

# Lester et al. 2021 sample among the 5,000 most common tokens; ids of learned vocabularies are ordered by frequency.
COMMON_TOKENS = 5_000

# With random K and V as large as the model's own, hardly anything is learned; a twentieth of that works (SmolLM2-135M,
# 30 steps of 8 rows: docs/learning.md).
RANDOM_SIZE = 0.05


def check_positive(name: str, value: object) -> None:
    """Raise unless `value` is an integer from 1 to 2^31 - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        raise ValueError(f"{name} expects an integer from 1 to {(1 << 31) - 1}, got {value!r:.300}")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} expects a number above 0, got {value!r:.300}")


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False: a text that says so is true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} expects True or False, got {value!r:.300}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} expects one of {', '.join(map(repr, choices))}, got {value!r:.300}")


def check_init(init: str | None, init_text: str | None, length: int | None) -> None:
    """Raise unless the three initialisation fields of a method are consistent."""
    check_choice("init", init, (None, "random", "vocabulary", "text"))
    if init == "text" and not init_text:
        raise ValueError('init="text" expects a text to start from, got none: give init_text="..."')
    if init != "text" and init_text is not None:
        raise ValueError(f'init_text is only read with init="text", got init={init!r}: set it, or leave init_text out')
    if length is not None:
        check_positive("length", length)


def text_ids(base: FrozenModel, text: str, length: int | None, *, special: bool) -> Tensor:
    """Ids `[length]` of a text, repeated if it is too short and truncated if it is too long; all of its ids if `length`
    is None.

    With `special`, it starts with the tokenizer's special tokens (a BOS if it adds one).
    """
    ids = base.tokenize(text)
    if not ids:
        raise ValueError(f"init_text expects a text of at least one token, got {text!r}")
    head = leading_special_ids(ids, base.tokenize(text, special=True)) if special else []
    length = length or len(head) + len(ids)
    repeats = -(-length // len(ids))
    return torch.tensor((head + ids * repeats)[:length])


def sampled_ids(base: FrozenModel, length: int) -> Tensor:
    """Ids `[length]` of distinct common words of the vocabulary (repeated if there are fewer)."""
    ids = base.words()[:COMMON_TOKENS]
    if not len(ids):
        raise ValueError(
            'init="vocabulary" expects words in the vocabulary, got special tokens alone: use init="random"'
        )
    ids = ids[torch.randperm(len(ids))]
    return ids.repeat(-(-length // len(ids)))[:length]


def embeddings(base: FrozenModel, ids: Tensor) -> Tensor:
    """Frozen embeddings `[..., embedding_size]` of `ids`, in fp32 on the CPU."""
    return base.embed(ids).detach().float().cpu()


def embedding_std(base: FrozenModel) -> float:
    """The standard deviation of the base's input embeddings, from a sample of the vocabulary."""
    ids = torch.linspace(0, base.shape.vocab_size - 1, min(1024, base.shape.vocab_size)).long()
    return embeddings(base, ids).std().item()


def real_matrices(base: FrozenModel, ids: Tensor, *, standing_in: bool) -> Prefix:
    """The frozen model's own K and V of the tokens `ids`, in fp32 on the CPU."""
    return base.prefix_of(ids, standing_in=standing_in).map(lambda of: of.detach().float().cpu())


def noise_like(real: Tensor) -> Tensor:
    """Normal values, a part of the size of the real ones `[..., A, G, P, D]` in each layer: layers differ 50 times."""
    return torch.randn_like(real) * RANDOM_SIZE * real.square().mean((-4, -3, -2, -1), keepdim=True).sqrt()


@torch.no_grad()
def scale_outputs(last: nn.Linear, outputs: Tensor, std: float) -> None:
    """Rescale the last layer of a network so that `outputs`, which it just computed, would have standard deviation
    `std`."""
    scale = std / outputs.std().clamp_min(1e-12)
    last.weight.mul_(scale)
    last.bias.mul_(scale)
