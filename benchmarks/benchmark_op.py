"""Micro-benchmarks of the op, comparable between commits: `pytest benchmarks/benchmark_op.py --benchmark-autosave`,
then on another commit `pytest benchmarks/benchmark_op.py --benchmark-compare`.

With a GPU, the tensors are on it, and each call is synchronised.
"""

from typing import Any

import pytest
import torch

from .providers import PROVIDERS, AttentionProblem
from .shapes import Mode, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: dict[str, tuple[Mode, Shape]] = {
    "forward": ("forward", Shape(8, 9, 3, 256, 128, 64)),
    "forward and backward": ("forward + backward", Shape(8, 9, 3, 256, 128, 64)),
    "forward and backward, short rows": ("forward + backward", Shape(16, 9, 3, 64, 128, 64)),
    "forward and backward, long prefix": ("forward + backward", Shape(4, 9, 3, 128, 4096, 64)),
    "forward and backward, a bank": ("forward + backward", Shape(16, 9, 3, 64, 128, 64, A=4)),
    "decoding, one row": ("decoding", Shape(1, 9, 3, 1, 512, 64, S=128)),
    "decoding": ("decoding", Shape(32, 9, 3, 1, 2048, 64, S=128)),
    "decoding, a bank": ("decoding", Shape(32, 9, 3, 1, 512, 64, S=128, A=8)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_op(benchmark: Any, name: str) -> None:
    mode, shape = SHAPES[name]
    problem = AttentionProblem.random(shape, mode, DEVICE)
    backend = "softkv triton" if DEVICE == "cuda" else "softkv torch"
    step = problem.step(PROVIDERS[backend].variants[""](problem), torch.randn_like(problem.q), problem.leaves)

    def call() -> None:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = mode
    benchmark(call)
