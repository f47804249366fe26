"""A frozen model of which only the sizes are known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from softkv.methods.base import BaseShape
from softkv.methods.matrices import empty_matrices
from softkv.prefix import Prefix


class Placeholder:
    """Stands for the frozen model (`FrozenModel`) where a soft prompt is built for its shapes alone: saved values
    replace the initial ones, or none are needed."""

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
