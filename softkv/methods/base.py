"""What every soft-prompt method is: a frozen config that builds a module of learned parameters.

Methods turn parameters into soft tokens or a `Prefix`. They know nothing of kernels or of transformers: what they may
ask of the frozen model is `FrozenModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from softkv.prefix import Prefix

Placement = Literal["before", "after", "inline"]


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a frozen model that decide the shapes of learned parameters."""

    layers: int  # L
    kv_heads: int  # G
    head_dim: int  # D
    hidden_size: int  # C
    embedding_size: int  # width of the input embeddings (C, but for a few OPT models)
    vocab_size: int


class FrozenModel(Protocol):
    """What a method may ask of the model that it steers."""

    shape: BaseShape

    def embed(self, ids: Tensor) -> Tensor:
        """Frozen input embeddings `[..., embedding_size]` of token ids, without gradient."""

    def prefix_of(self, ids: Tensor) -> Prefix:
        """The K/V of the tokens `ids` `[P]`, run through the frozen model."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text without special tokens; an error when no tokenizer was given."""


class Method(Protocol):
    """A frozen config: says what is learned and where it goes."""

    template: str

    def build(self, base: FrozenModel) -> SoftPrompt:
        """The module of learned parameters, initialised for this frozen model."""

    def encode(self, tokenizer: Any, *, answer: str | None = None, **fields: str) -> dict[str, list[int]]:
        """`{"input_ids", "labels"}` of one example; soft token `[Pi]` has id `-i`, labels are -100 off the answer."""


class SoftPrompt(nn.Module):
    """The learned parameters of a method, in fp32, and what they give at a forward pass.

    Attributes:
        config: the method that built it.
        placement: where `soft_tokens` go: "before" or "after" a row's prompt, "inline" at negative ids, or None
            when the method has none.
        encodes_rows: whether `row_prefix` makes the K/V of each block from the hidden states that enter it.
    """

    placement: Placement | None = None
    encodes_rows: bool = False

    def __init__(self, config: Method) -> None:
        super().__init__()
        self.config = config

    def soft_tokens(self) -> Tensor | None:
        """Soft embeddings `[k, embedding_size]`."""
        return None

    def prefix(self) -> Prefix | None:
        """The learned prefix of all rows, `[L or 1, 1, G, P, D]`."""
        return None

    def row_prefix(self, layer: int, hidden: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `[R, G, n, D]` of block `layer` from the prompt's hidden states `[R, M, C]`, of which row r has
        `lengths[r]` (the rest is padding and must not matter)."""
        raise NotImplementedError(f"{type(self).__name__} does not encode rows")

    def folded(self) -> SoftPrompt:
        """What is worth keeping after training: reparametrisations computed once, their networks left out."""
        return self
