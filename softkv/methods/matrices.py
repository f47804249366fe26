"""Learned key and value matrices, shared by prefix-tuning (one pair for all layers) and P-tuning v2 (one per layer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softkv.methods import initial
from softkv.methods.base import BaseShape, Computed, FrozenModel, Method, SoftMatrices
from softkv.prefix import Prefix, stacked

# The initial standard deviation of networks that compute matrices: small enough that slots hardly disturb the frozen
# model before training, large enough that they differ and don't all learn the same. (SmolLM2-135M, n = 32, 96 movie
# snippets: an untrained loss of 4.98 with slots of almost 0, 4.92 with 0.1, 5.65 with 0.3.)
INIT_STD = 0.1

LENGTH = 32

# The hidden width of Li & Liang's reparametrisation.
REPARAMETRIZE_SIZE = 512


def check_matrices(
    init: str | None,
    init_text: str | None,
    init_std: float | None,
    length: int | None,
    reparametrize: bool,
    reparametrize_size: int | None,
) -> None:
    """Raise unless the fields shared by prefix-tuning and P-tuning v2 are consistent."""
    initial.check_init(init, init_text, length)
    if init_std is not None:
        if init not in (None, "random"):
            raise ValueError(f'init_std is only read with init="random", got init={init!r}: leave one of them out')
        initial.check_number("init_std", init_std)
    initial.check_flag("reparametrize", reparametrize)
    if reparametrize and init not in (None, "random"):
        raise ValueError(f'reparametrize=True expects init="random", got {init!r}: the network sets the start')
    if reparametrize_size is not None:
        initial.check_positive("reparametrize_size", reparametrize_size)
        if not reparametrize:
            raise ValueError("reparametrize_size is only read with reparametrize=True: set it, or leave the size out")


def resolved_init(init: initial.Init | None, init_std: float | None) -> initial.Init:
    """The initialisation, by default from real tokens' K/V."""
    return init or ("vocabulary" if init_std is None else "random")


def empty_matrices(shape: BaseShape, layers: int, length: int | None) -> Prefix:
    """Zeros, of a number of layers or one for all, to load saved values into."""
    if length is None:
        raise ValueError("length expects the number of saved slots, got None")
    widths = shape.by_layer[:layers]
    k = stacked([torch.zeros(1, each.kv_heads, length, each.head_dim) for each in widths])
    return Prefix(k, stacked([torch.zeros(1, each.kv_heads, length, each.value_dim) for each in widths]))


def initial_matrices(
    base: FrozenModel,
    length: int | None,
    init: initial.Init,
    init_text: str | None,
    init_std: float | None,
) -> Prefix:
    """First K and V of plain matrices, of each layer."""
    if init == "text":
        assert init_text is not None
        return initial.real_matrices(base, initial.text_ids(base, init_text, length, special=True), standing_in=True)
    length = length or LENGTH
    if init == "random" and init_std is not None:
        std = init_std
        return empty_matrices(base.shape, base.shape.layers, length).map(lambda of: torch.randn_like(of) * std)
    real = initial.real_matrices(base, initial.sampled_ids(base, length), standing_in=False)
    return real if init == "vocabulary" else real.map(initial.noise_like)


class ReparametrizedMatrices(Computed):
    """Matrices computed by an MLP from learned embeddings during training (Li & Liang 2021); folded to plain ones."""

    def __init__(self, config: Method, shape: BaseShape, layers: int, length: int, size: int, std: float) -> None:
        super().__init__(config)
        self.widths = shape.by_layer[:layers]
        self.embeddings = nn.Parameter(torch.randn(length, size))
        last = nn.Linear(size, sum(each.of_slot for each in self.widths))
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.Tanh(), last)
        initial.scale_outputs(last, self.compute(), std)

    def compute(self) -> Tensor:
        """`[n, L or 1 · G·(D + Dv)]`"""
        return self.mlp(self.embeddings)

    def _matrices(self, computed: Tensor) -> Prefix:
        slots = computed.split([each.of_slot for each in self.widths], -1)
        pairs = [each.split(of_layer) for each, of_layer in zip(self.widths, slots, strict=True)]  # [n, G, D or Dv]
        k, v = (stacked([x.transpose(0, 1)[None] for x in of]) for of in zip(*pairs, strict=True))
        return Prefix(k, v)

    def prefix(self) -> Prefix:
        return self._matrices(self.computed())

    @torch.no_grad()
    def folded(self) -> SoftMatrices:
        prefix = self._matrices(self.compute())
        return SoftMatrices(self.config, prefix.k, prefix.v, window_covers=False)
