"""How much attention goes to a prefix: a diagnostic. A prefix that takes all of it hides the tokens from the model; one
that takes none has no effect."""

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
    """Collect the attention mass on prefixes in forward passes of this context: `[H]` by block number, of the last
    pass."""
    masses: dict[int, Tensor] = {}
    token = _wanted.set(masses)
    try:
        yield masses
    finally:
        _wanted.reset(token)


def wanted() -> dict[int, Tensor] | None:
    """The dict that collects masses, or None."""
    return _wanted.get()


@torch.no_grad()
def of_call(attend: Callable[..., Tensor], prefix: dict[str, Any]) -> Tensor:
    """`[H]`: the share of attention that goes to the prefix, averaged over all queries of a call.

    It is the output of attention with values of 1 in the prefix and 0 elsewhere.

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
    """The share of attention that goes to a SoftModel's prefix.

    Args:
        model: a `SoftModel` whose active soft prompt is in front of its rows (a prefix, an encoder, soft tokens
            "before").
        rows: `{"input_ids", "labels"}` each, as returned by `method.encode`; all tokens of a row count as queries.

    Returns:
        fp32 `[L, H]`, from 0 to 1: mean over rows.

    Raises:
        ValueError: if nothing is in front of the rows, or there are no rows.
    """
    if not rows:
        raise ValueError("attention_mass expects at least one row, got none")
    found = mass_of_rows(model, rows)
    if found is None:
        raise ValueError(
            f"{type(model.method).__name__} learns soft tokens inside the rows here, not a prefix in front of them: "
            "there is no attention to a prefix to measure"
        )
    return found


def mass_of_rows(model: Any, rows: list[dict[str, Any]]) -> Tensor | None:
    """Like `attention_mass`; None if nothing is in front of the rows."""
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
