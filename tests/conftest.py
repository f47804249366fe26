"""Without a GPU the kernels run in Triton's interpreter, to be chosen before triton is first imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _differentiates() -> Iterator[None]:
    """A test that leaves gradients off fails itself, and no other."""
    yield
    left_on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left_on, "gradients were left off"
