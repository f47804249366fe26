"""A frozen model with known sizes only."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from softkv.methods.base import BaseShape
from softkv.methods.matrices import empty_matrices
from softkv.prefix import Prefix


class Placeholder:
    """A `FrozenModel` for building soft prompts whose initial values don't matter: saved values replace them, or only
    shapes are needed."""

    def __init__(self, shape: BaseShape) -> None:
        self.shape = shape

    def embed(self, ids: Tensor) -> Tensor:
        return torch.ones(*ids.shape, self.shape.embedding_size)

    def prefix_of(self, ids: Tensor, *, standing_in: bool = True) -> Prefix:
        return replace(empty_matrices(self.shape, self.shape.layers, len(ids)), window_covers=True)

    def words(self) -> Tensor:
        return torch.zeros(1, dtype=torch.long)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return [0]
