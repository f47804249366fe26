"""P-tuning v2: soft keys and values of each layer's own (Liu et al. 2021, arXiv:2110.07602)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from softkv.methods import initial
from softkv.methods.base import FrozenModel, Method, SoftMatrices, SoftPrompt
from softkv.methods.matrices import (
    INIT_STD,
    REPARAMETRIZE_SIZE,
    ReparametrizedMatrices,
    check_matrices,
    empty_matrices,
    initial_matrices,
)
from softkv.methods.template import check_no_soft_tokens


@dataclass(frozen=True, kw_only=True)
class PTuningV2(Method):
    """A key and a value matrix of n slots for each attention block.

    Trainable: `2·n·G·D·L` values, fp32, as `k, v [L, 1, G, n, D]`.

    Args:
        length: n; None with `init="text"` takes the text's number of tokens (a BOS included where the tokenizer adds
            one).
        init: "random"; or the model's own K/V of common tokens ("vocabulary") or of `init_text` ("text"). Untrained,
            the latter is that text in context, in sliding-window layers too: there, and only there, windows count the
            slots.
        init_text: repeated or cut to `length`.
        init_std: standard deviation of a random start; 0.3 if None.
        reparametrize: compute the matrices by an MLP from learned embeddings while training; `folded` leaves the plain
            matrices.
        reparametrize_size: width of these embeddings and of the MLP; 512 if None.
        template: how `encode` builds a row; without soft tokens.

    Raises:
        ValueError: when fields don't fit together.
    """

    length: int | None = None
    init: initial.Init = "random"
    init_text: str | None = None
    init_std: float | None = None
    reparametrize: bool = False
    reparametrize_size: int | None = None
    template: str = "[X] [Y]"

    def __post_init__(self) -> None:
        check_matrices(
            self.init, self.init_text, self.init_std, self.length, self.reparametrize, self.reparametrize_size
        )
        check_no_soft_tokens(self.template, "PTuningV2")

    def build(self, base: FrozenModel, *, folded: bool = False) -> SoftPrompt:
        """`SoftMatrices` with `k, v [L, 1, G, n, D]`, or the network that computes them."""
        layers, window_covers = base.shape.layers, self.init == "text"
        if folded:
            k, v = empty_matrices(base.shape, layers, self.length)
            return SoftMatrices(self, k, v, window_covers=window_covers)
        if self.reparametrize:
            assert self.length is not None
            size, std = self.reparametrize_size or REPARAMETRIZE_SIZE, self.init_std or INIT_STD
            return ReparametrizedMatrices(self, base.shape, layers, self.length, size, std)
        k, v = initial_matrices(base, layers, self.length, self.init, self.init_text, self.init_std)
        return SoftMatrices(replace(self, length=k.shape[3]), k, v, window_covers=window_covers)
