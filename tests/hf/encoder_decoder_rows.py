"""Rows that encoder-decoders read and write."""

import torch
from torch import Tensor

from tests.hf.encoder_decoders import EOS

READ = [[5, 6, 7, 8, 9, EOS], [10, 11, EOS], [12, 13, 14, 15, EOS]]
WRITTEN = [[4, 5, EOS], [7, EOS], [20, 21, 22, EOS]]


def labels_of(written: list[list[int]]) -> Tensor:
    width = max(map(len, written))
    return torch.tensor([row + [-100] * (width - len(row)) for row in written])
