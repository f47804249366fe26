"""Learned key and value matrices, shared by prefix-tuning (one pair for all layers) and P-tuning v2 (one per layer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softkv.methods import initial
from softkv.methods.base import BaseShape, Computed, FrozenModel, Method, SoftMatrices, check_uniform
from softkv.prefix import Prefix

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
        if not init_std > 0:
            raise ValueError(f"init_std expects a number above 0, got {init_std!r}")
    if reparametrize and init not in (None, "random"):
        raise ValueError(f'reparametrize=True expects init="random", got {init!r}: the network sets the start')
    if reparametrize_size is not None:
        initial.check_positive("reparametrize_size", reparametrize_size)
        if not reparametrize:
            raise ValueError("reparametrize_size is only read with reparametrize=True: set it, or leave the size out")


def resolved_init(init: initial.Init | None, init_std: float | None) -> initial.Init:
    """The initialisation, by default from real tokens' K/V."""
    return init or ("vocabulary" if init_std is None else "random")


def empty_matrices(shape: BaseShape, layers: int, length: int | None) -> tuple[Tensor, Tensor]:
    """Zeros, keys `[layers, 1, G, n, D]` and values `[layers, 1, G, n, Dv]` to load saved ones into."""
    if length is None:
        raise ValueError("length expects the number of saved slots, got None")
    check_uniform(shape)
    size = (layers, 1, shape.kv_heads, length)
    return torch.zeros(*size, shape.head_dim), torch.zeros(*size, shape.value_dim)


def initial_matrices(
    base: FrozenModel,
    length: int | None,
    init: initial.Init,
    init_text: str | None,
    init_std: float | None,
) -> tuple[Tensor, Tensor]:
    """Initial K `[L, 1, G, n, D]` and V `[L, 1, G, n, Dv]` of plain matrices."""
    check_uniform(base.shape)
    if init == "text":
        assert init_text is not None
        return initial.real_matrices(base, initial.text_ids(base, init_text, length, special=True), standing_in=True)
    length = length or LENGTH
    if init == "random" and init_std is not None:
        k, v = empty_matrices(base.shape, base.shape.layers, length)
        return torch.randn_like(k) * init_std, torch.randn_like(v) * init_std
    k, v = initial.real_matrices(base, initial.sampled_ids(base, length), standing_in=False)
    return (k, v) if init == "vocabulary" else (initial.noise_like(k), initial.noise_like(v))


class ReparametrizedMatrices(Computed):
    """Matrices computed by an MLP from learned embeddings during training (Li & Liang 2021); folded to plain ones."""

    def __init__(self, config: Method, shape: BaseShape, layers: int, length: int, size: int, std: float) -> None:
        super().__init__(config)
        check_uniform(shape)
        self.shape, self.layers = shape, layers
        self.embeddings = nn.Parameter(torch.randn(length, size))
        last = nn.Linear(size, layers * shape.kv_width)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.Tanh(), last)
        initial.scale_outputs(last, self.compute(), std)

    def compute(self) -> Tensor:
        """`[n, L or 1, G·(D + Dv)]`"""
        return self.mlp(self.embeddings).unflatten(1, (self.layers, -1))

    def _matrices(self, computed: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.shape.split_kv(computed)  # [n, L or 1, G, D or Dv]
        return k.permute(1, 2, 0, 3).unsqueeze(1), v.permute(1, 2, 0, 3).unsqueeze(1)

    def prefix(self) -> Prefix:
        return Prefix(*self._matrices(self.computed()))

    @torch.no_grad()
    def folded(self) -> SoftMatrices:
        k, v = self._matrices(self.compute())
        return SoftMatrices(self.config, k.contiguous(), v.contiguous(), window_covers=False)
