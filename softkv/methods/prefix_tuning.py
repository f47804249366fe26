"""Prefix-tuning: soft keys and values in front of the tokens of every attention block (Li & Liang 2021,
arXiv:2101.00190), here with one pair of matrices that all layers share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from softkv.methods import initial
from softkv.methods.base import BaseShape, FrozenModel, Method, SoftMatrices, SoftPrompt
from softkv.methods.matrices import (
    INIT_STD,
    LENGTH,
    REPARAMETRIZE_SIZE,
    ReparametrizedMatrices,
    check_matrices,
    empty_matrices,
    initial_matrices,
    resolved_init,
)
from softkv.methods.template import check_no_soft_tokens
from softkv.methods.where import Site, checked_where


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """One key and one value matrix of n slots, read by every attention block.

    Trainable: `n·G·(D + Dv)` values, fp32, as `k [1, 1, G, n, D]` and `v [1, 1, G, n, Dv]`: `2·n·G·D` except in
    multi-head latent attention, where Dv differs from D.

    Args:
        length: n; None: the text's number of tokens with `init="text"` (including a BOS if the tokenizer adds one),
            else 32.
        init: the mean over layers of the model's own K/V of common tokens ("vocabulary") or of `init_text` ("text"); or
            "random". None: "vocabulary", or "random" with `init_std` or `reparametrize`. The mean is not equivalent to
            that text in the context, as it is in `PTuningV2`.
        init_text: repeated or truncated to `length`.
        init_std: standard deviation of random values. None: a twentieth of the size of the model's own K and V; 0.1 for
            a network.
        reparametrize: compute the matrices with an MLP from learned embeddings during training; `folded` keeps the
            plain matrices.
        reparametrize_size: width of these embeddings and of the MLP; 512 if None.
        where: in an encoder-decoder, which attention has the prefix: "encoder" and "decoder" (self-attention), "cross"
            (from the decoder to the encoder); None: all that softkv supports on the model. None in other models.
        template: how `encode` builds a row; it has no soft tokens.

    Raises:
        ValueError: if fields are inconsistent.

    Example:
        >>> softkv.attach(base, softkv.PrefixTuning(length=4)).num_trainable()  # 2·n·G·D
        128
    """

    length: int | None = None
    init: initial.Init | None = None
    init_text: str | None = None
    init_std: float | None = None
    reparametrize: bool = False
    reparametrize_size: int | None = None
    where: tuple[Site, ...] | None = None
    template: str = "[X] [Y]"
    suits: ClassVar[str] = "the smallest prefix, one pair of matrices for all layers; learns least"
    learns: ClassVar[str] = "2·n·G·D"

    def __post_init__(self) -> None:
        check_matrices(
            self.init, self.init_text, self.init_std, self.length, self.reparametrize, self.reparametrize_size
        )
        check_no_soft_tokens(self.template, "PrefixTuning")
        object.__setattr__(self, "where", checked_where(self.where))

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        """`SoftMatrices` with `k [1, 1, G, n, D]` and `v [1, 1, G, n, Dv]`, or the MLP that computes them."""
        _check_alike(base.shape)
        if folded:
            empty = empty_matrices(base.shape, 1, self.length)
            return SoftMatrices(self, empty.k, empty.v, window_covers=False)
        if self.reparametrize:
            size, std = self.reparametrize_size or REPARAMETRIZE_SIZE, self.init_std or INIT_STD
            config = replace(self, length=self.length or LENGTH)
            return ReparametrizedMatrices(config, base.shape, 1, self.length or LENGTH, size, std)
        init = resolved_init(self.init, self.init_std)
        first = initial_matrices(base, self.length, init, self.init_text, self.init_std)
        # A mean of noise is smaller than noise.
        scale = math.sqrt(base.shape.layers) if init == "random" else 1.0
        first = first.map(lambda of: scale * of.mean(0, keepdim=True))
        return SoftMatrices(replace(self, length=first.length, init=init), first.k, first.v, window_covers=False)


def _check_alike(shape: BaseShape) -> None:
    """Raise where no one key and value can stand in all layers."""
    if shape.widths:
        raise ValueError(
            "PrefixTuning has one key and one value for all layers, but this model's layers differ in key/value heads "
            "or head dims: use PTuningV2, which has some of each layer's own"
        )
