"""Where in an encoder-decoder a prefix stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

Site = Literal["encoder", "decoder", "cross"]

# In the order in which the layers of a prefix hold them.
SITES: tuple[Site, ...] = ("encoder", "decoder", "cross")


def checked_where(where: Any) -> tuple[Site, ...] | None:
    """The sites named, each once and in order; None for none named.

    Raises:
        ValueError: for other names, or none.
    """
    if where is None:
        return None
    named = [where] if isinstance(where, str) else list(where) if isinstance(where, Iterable) else [where]
    if not named or any(site not in SITES for site in named):
        raise ValueError(f"where expects some of {', '.join(map(repr, SITES))}, or None, got {where!r}")
    return tuple(site for site in SITES if site in named)


def where_of(adapter: Any) -> tuple[Site, ...] | None:
    """What a method, or a saved adapter of one, says of where its prefix stands; None where it says nothing."""
    return cast("tuple[Site, ...] | None", getattr(getattr(adapter, "method", adapter), "where", None))


def sections(counts: Sequence[tuple[Site, int]], where: Sequence[Site]) -> dict[Site, slice]:
    """The layers of a prefix that stand at each of the sites it has, of which a model has so many blocks."""
    found: dict[Site, slice] = {}
    begin = 0
    for site, blocks in counts:
        if site in where:
            found[site] = slice(begin, begin + blocks)
            begin += blocks
    return found
