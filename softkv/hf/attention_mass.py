"""How much attention goes to a prefix: a diagnostic. A prefix that takes all leaves a model blind to its tokens; one
that takes none does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

_wanted: ContextVar[dict[int, Tensor] | None] = ContextVar("softkv_attention_mass", default=None)


@contextmanager
def collecting() -> Iterator[dict[int, Tensor]]:
    """Collects the attention mass on prefixes in the forward passes of this context: `[H]` by the number of a block,
    the last pass last."""
    masses: dict[int, Tensor] = {}
    token = _wanted.set(masses)
    try:
        yield masses
    finally:
        _wanted.reset(token)


def wanted() -> dict[int, Tensor] | None:
    """Where masses are collected, or None."""
    return _wanted.get()


@torch.no_grad()
def of_call(attend: Callable[..., Tensor], prefix: dict[str, Any]) -> Tensor:
    """`[H]`: the part of attention that goes to the prefix, mean over all queries of a call.

    It is what the call gives for values of 1 in the prefix and 0 elsewhere.

    Args:
        attend: an attention function, with query, key and value as its first arguments: `[B, ., T, D]` and with
            `out [B, H, T, Dv]`, or packed, `[N, ., D]` and `out [N, H, Dv]`.
        prefix: the keywords of its prefix.
    """
    assert isinstance(attend, partial)
    query, key, value, *others = attend.args
    ones = prefix | {"prefix_v": torch.ones_like(prefix["prefix_v"])}
    out = attend.func(query, key, torch.zeros_like(value), *others, **attend.keywords, **ones)[..., 0].float()
    return out.mean(0) if out.dim() == 2 else out.mean((0, 2))


@torch.no_grad()
def attention_mass(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """The part of attention that goes to a SoftModel's prefix.

    Args:
        model: a `SoftModel` whose active soft prompt stands in front of its rows (a prefix, an encoder, soft tokens
            "before").
        rows: `{"input_ids", "labels"}` each, as `method.encode` gives them; all of a row's tokens count as queries.

    Returns:
        fp32 `[L, H]`, from 0 to 1: mean over rows.

    Raises:
        ValueError: when nothing stands in front of the rows, or there are no rows.
    """
    if not rows:
        raise ValueError("attention_mass expects at least one row, got none")
    found = mass_of_rows(model, rows)
    if found is None:
        raise ValueError(
            f"{type(model.method).__name__} learns soft tokens inside the rows here, and no prefix in front of them: "
            "the attention that a prefix takes can't be told"
        )
    return found


def mass_of_rows(model: Any, rows: list[dict[str, Any]]) -> Tensor | None:
    """As `attention_mass`; None where nothing stands in front of the rows."""
    training = model.training
    model.eval()
    try:
        found = [_of_row(model, row) for row in rows]
    finally:
        model.train(training)
    known = [each for each in found if each is not None]
    return torch.stack(known).mean(0) if known else None


@torch.no_grad()
def _of_row(model: Any, row: dict[str, Any]) -> Tensor | None:
    inputs = {name: torch.as_tensor(row[name], device=model.device)[None] for name in ("input_ids", "labels")}
    with collecting() as masses:
        model(**inputs, use_cache=False)
    return torch.stack([masses[layer].cpu() for layer in sorted(masses)]) if masses else None
