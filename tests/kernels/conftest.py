"""Poisoned memory, and bf16 in Triton's interpreter."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should write starts as NaN."""
    plain_like, plain_new = torch.empty_like, torch.Tensor.new_empty_strided

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(plain_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", lambda *a, **k: poison(plain_new(*a, **k)))


@pytest.fixture
def bf16() -> Iterator[None]:
    """Repair bf16 in Triton's interpreter, which multiplies the raw bits of bf16 operands and truncates casts."""
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        wide = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def exact_dot(self, a, b, d, *rest):
        return dot(self, widen(a), widen(b), d, *rest)

    def rounding_cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(bits.view(np.uint16), tl.bfloat16)
        return cast(self, src, dst_type)

    patch = pytest.MonkeyPatch()
    patch.setattr(builder, "create_dot", exact_dot)
    patch.setattr(builder, "cast_impl", rounding_cast)
    yield
    patch.undo()
