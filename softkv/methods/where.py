"""The kinds of attention of an encoder-decoder that a prefix acts in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

Site = Literal["encoder", "decoder", "cross"]

# In the order of the layers of a prefix.
SITES: tuple[Site, ...] = ("encoder", "decoder", "cross")


def checked_where(where: Any) -> tuple[Site, ...] | None:
    """The given sites, each once and in order; None if none are given.

    Raises:
        ValueError: for unknown names, or an empty tuple.
    """
    if where is None:
        return None
    named = [where] if isinstance(where, str) else list(where) if isinstance(where, Iterable) else [where]
    if not named or any(site not in SITES for site in named):
        raise ValueError(f"where expects some of {', '.join(map(repr, SITES))}, or None, got {where!r}")
    return tuple(site for site in SITES if site in named)


def where_of(adapter: Any) -> tuple[Site, ...] | None:
    """The `where` of a method or of a saved adapter; None if it has none."""
    return cast("tuple[Site, ...] | None", getattr(getattr(adapter, "method", adapter), "where", None))


def sections(counts: Sequence[tuple[Site, int]], where: Sequence[Site]) -> dict[Site, slice]:
    """The range of a prefix's layers for each of its sites, given the model's number of blocks per site."""
    found: dict[Site, slice] = {}
    begin = 0
    for site, blocks in counts:
        if site in where:
            found[site] = slice(begin, begin + blocks)
            begin += blocks
    return found
