"""The verdict on a result: "ok", "wrong: …", "refused: …" (softkv's message) or "crash: …"."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = 2e-3  # of the standard deviation of the logits wanted; fp32 leaves about 1e-5


def direction(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(logits)))


def error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    error = ((got - want).abs().max() / want.std().clamp_min(1e-6)).item()
    return error if error == error else float("inf")


def far(got: Tensor, want: Tensor) -> bool:
    return error(got, want) > 10 * TOLERANCE


def verdict(got: list[Tensor], wanted: list[Tensor]) -> str:
    worst = max(error(one, want) for one, want in zip(got, wanted, strict=True))
    return "ok" if worst < TOLERANCE else f"wrong: {worst:.2g}"


def outcome(trial: Callable[[], str]) -> str:
    try:
        return trial()
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> str:
    """A refusal is a `ValueError` or the like that softkv itself raises."""
    frames = traceback.extract_tb(error.__traceback__)
    own = "/softkv/" in frames[-1].filename or "/kernels/" in frames[-1].filename
    refused = (
        own
        and isinstance(error, (ValueError, NotImplementedError))
        and not _OBSCURE.intersection(str(error).split(": "))
    )
    return f"{'refused' if refused else 'crash'}: {sentence(error, refused)}"


_OBSCURE = {"TypeError", "AttributeError", "IndexError", "KeyError", "RuntimeError", "AssertionError"}


def sentence(error: Exception, refused: bool = False) -> str:
    text = " ".join(str(error).split())
    return text[:300] if refused else f"{type(error).__name__}: {text}"[:200]
