"""Splits a call into pieces, using slices instead of masks wherever they are equivalent."""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from softkv.ops.torch.geometry import FEW_QUERIES, Geometry, Piece, Queries

# torch's backward parallelises over the heads of a batch, not over queries: the queries of a shared prefix are cut into
# this many chunks, always the same number, so that the order of summation is fixed.
_CHUNKS = 4
# torch's causal kernel skips whole blocks of 512 keys only: below this many queries, tiles with a mask skip more.
_LONG = 1024
_SHORT = 96
_ROWS_AT_ONCE = 4


Tile: TypeAlias = tuple[int, int, int, int, Tensor | None, bool]  # t0, t1, s0, s1, mask, causal kernel


def plan_tokens(call: Geometry) -> list[Piece]:
    if call.S == 0:
        return []
    causal, window = call.options["is_causal"], call.window
    if call.masked:
        piece = _masked_tokens(call)
        return [piece] if piece.s1 else []
    pieces = []
    for run in call.row_groups:
        n, offset = run.hi - run.lo, run.n - run.T - run.lo
        if call.chunk is None:
            tiles = _band(call, run.T, n, offset, causal, window)
        else:
            tiles = _chunks(call, run.T, n, offset, run.slots if call.covers else run.lo, call.chunk)
        for t0, t1, s0, s1, mask, flag in tiles:
            blind = None
            if run.holes is not None:
                holes = _additive(run.holes[run.lo + s0 : run.lo + s1], call.dtype).expand(t1 - t0, -1)
                if flag:
                    mask = _band_mask(call, t1 - t0, s1 - s0, 0, True, call.S)
                mask, flag = holes.contiguous() if mask is None else mask + holes, False
                blind = (mask == float("-inf")).all(-1)
            keys = run.key_start + run.lo
            pieces.append(
                Piece(
                    Queries(run.start, run.rows, run.T, t0, t1), slice(run.key_row, run.key_row + run.rows),
                    keys + s0, keys + s1, mask, flag, blind,
                )
            )  # fmt: skip
    return pieces


def plan_prefix(call: Geometry) -> list[Piece]:
    if call.P == 0:
        return []
    given = call.options["prefix_lengths"]
    lengths = [call.P] * call.A if given is None else given.tolist()
    if max(lengths) == 0:
        return []
    index = call.options["prefix_index"]
    reach = call.window if call.chunk is None else call.chunk
    if reach is not None and call.covers and any(run.n - run.lo + max(lengths) > reach for run in call.row_groups):
        return _covered_prefix(call, reach, lengths, None if index is None else index.tolist())
    if index is None and call.A == 1:
        return _shared(call, 0, lengths[0], 0, call.N)
    if index is None and call.dense:
        return _prefix_per_row(call, lengths)
    readers: dict[int, list[int]] = {}
    for b, a in enumerate(range(call.B) if index is None else index.tolist()):
        if 0 <= a < call.A and lengths[a] and call.starts[b] < call.starts[b + 1]:
            readers.setdefault(a, []).append(b)
    if _few_each(call, readers):
        return [_bank(call, readers, lengths)]
    pieces = []
    for a, rows in readers.items():
        if rows[-1] - rows[0] == len(rows) - 1:
            pieces += _shared(call, a, lengths[a], call.starts[rows[0]], call.starts[rows[-1] + 1])
        else:
            tokens = call.tokens_of(rows)
            queries = Queries(0, 1, len(tokens), 0, len(tokens), tokens)
            pieces.append(Piece(queries, slice(a, a + 1), 0, lengths[a]))
    return pieces


def _shared(call: Geometry, a: int, length: int, start: int, stop: int) -> list[Piece]:
    """All queries from token `start` to `stop`, attending to prefix a."""
    if length == 0:
        return []
    chunks = _CHUNKS if call.backward and call.fused and stop - start >= _CHUNKS * _SHORT else 1
    each = (stop - start) // chunks
    pieces = [Piece(Queries(start, chunks, each, 0, each), slice(a, a + 1), 0, length)]
    if rest := stop - start - chunks * each:
        pieces.append(Piece(Queries(stop - rest, 1, rest, 0, rest), slice(a, a + 1), 0, length))
    return pieces


def _prefix_per_row(call: Geometry, lengths: list[int]) -> list[Piece]:
    T, P = call.T, max(lengths)
    if min(lengths) == P:
        return [Piece(Queries(0, call.B, T, 0, T), slice(0, call.B), 0, P)]
    if T <= FEW_QUERIES:
        seen = torch.arange(P, device=call.device) < torch.tensor(lengths, device=call.device)[:, None]
        return [_masked(call, seen[:, None].expand(-1, T, -1), slice(0, call.B))]
    return [Piece(Queries(b * T, 1, T, 0, T), slice(b, b + 1), 0, length) for b, length in enumerate(lengths) if length]


def _few_each(call: Geometry, readers: dict[int, list[int]]) -> bool:
    """Whether the prefixes read are adjacent in the bank and have few queries each, about equally many, as in
    generation with one adapter per row."""
    if call.backward or not call.dense or len(readers) < 2:
        return False
    most = max(len(rows) for rows in readers.values())
    neighbours = max(readers) - min(readers) == len(readers) - 1
    return neighbours and most * call.T <= FEW_QUERIES and most * len(readers) <= 2 * sum(map(len, readers.values()))


def _bank(call: Geometry, readers: dict[int, list[int]], lengths: list[int]) -> Piece:
    """All prefixes that are read, in one call. If one has fewer readers than another, its last reader is repeated, with
    the same result."""
    most = max(len(rows) for rows in readers.values())
    used = sorted(readers)
    rows = [row for a in used for row in readers[a] + readers[a][-1:] * (most - len(readers[a]))]
    size = torch.tensor([lengths[a] for a in used], device=call.device)
    longest, mask = max(lengths[a] for a in used), None
    if min(lengths[a] for a in used) < longest:
        mask = _additive(torch.arange(longest, device=call.device) < size[:, None], call.dtype)[:, None, None]
    queries = Queries(0, len(used), most * call.T, 0, most * call.T, call.tokens_of(rows))
    return Piece(queries, slice(used[0], used[-1] + 1), 0, longest, mask)


def _covered_prefix(call: Geometry, reach: int, lengths: list[int], index: list[int] | None) -> list[Piece]:
    """The slots that windows, or chunks, leave to queries."""
    shared = index is None and call.A == 1
    if shared and call.masked and not call.backward:  # its gradient would need one copy per row
        n, lo, _, _ = (x[:, None, None] for x in call.extent)
        query = n - call.T + torch.arange(call.T, device=call.device)[:, None] - lo + lengths[0]  # slot 0 stands at 0
        begin = query - reach + 1 if call.chunk is None else query.div(reach, rounding_mode="floor") * reach
        return [_masked(call, torch.arange(lengths[0], device=call.device) >= begin, slice(0, 1))]
    pieces = []
    for run in call.row_groups:
        step = _ROWS_AT_ONCE if shared else 1
        for first in range(run.first, run.first + run.rows, step):
            rows = min(step, run.first + run.rows - first)
            a = 0 if shared else first if index is None else index[first]
            if not 0 <= a < call.A:
                continue
            offset = run.n - run.T - run.lo + lengths[a]
            start = run.start + (first - run.first) * run.T
            tiles = _band(call, run.T, lengths[a], offset, False, reach)
            if call.chunk is not None:
                tiles = _slots_of_chunks(run.T, lengths[a], offset, reach)
            for t0, t1, s0, s1, mask, _ in tiles:
                pieces.append(Piece(Queries(start, rows, run.T, t0, t1), slice(a, a + 1), s0, s1, mask))
    return pieces


def _masked_tokens(call: Geometry) -> Piece:
    n, lo, end, _ = (x[:, None, None] for x in call.extent)
    S = int(end.max())
    position = torch.arange(S, device=call.device)
    query = n - call.T + torch.arange(call.T, device=call.device)[:, None]
    seen = position < end
    if call.key_mask is not None:
        seen = seen & call.key_mask[:, None, :S]
    if call.options["is_causal"]:
        seen = seen & (position <= query)
    if call.window is not None:
        seen = seen & (position > query - call.window)
    if call.chunk is not None:
        front = lo - torch.tensor(call.slots, device=call.device)[:, None, None] if call.covers else 0
        begin = (query - front).div(call.chunk, rounding_mode="floor") * call.chunk
        seen = seen & (position - front >= begin)
    return _masked(call, seen.expand(-1, call.T, -1), slice(0, call.B))


def _masked(call: Geometry, seen: Tensor, key_rows: slice) -> Piece:
    """All rows in one call, with `seen` [B, T, s] as a mask: for few queries, where calls cost more than work."""
    queries = Queries(0, call.B, call.T, 0, call.T)
    return Piece(
        queries, key_rows, 0, seen.shape[2], _additive(seen, call.dtype)[:, None], False, ~seen.any(-1)[:, None]
    )


def _band(call: Geometry, T: int, n: int, offset: int, causal: bool, window: int | None) -> Iterator[Tile]:
    """Tiles of T queries over n keys, where query t is at key position t + offset and sees keys up to itself (causal)
    and after t + offset − window. Queries that see nothing are in no tile."""
    reach = offset + T + n if window is None else window  # without a window, one that hides nothing
    first = max(0, -offset) if causal else 0
    last = min(T, n - 1 + reach - offset)
    if n <= 0 or first >= last:
        return
    size = last - first
    bounded = last - 1 + offset - reach >= 0
    if bounded:
        size = max(64, min(256, reach // 4))
    elif causal and first + offset < n - 1:
        if first + offset == 0 and call.fused and (size <= _SHORT or size >= _LONG):
            yield first, last, 0, min(n, size), None, True
            return
        size = max(64, size // 8)
    for t0 in range(first, last, size):
        t1 = min(last, t0 + size)
        s0 = max(0, t0 + offset - reach + 1)
        s1 = min(n, t1 + offset) if causal else n
        hidden = (causal and t0 + offset < s1 - 1) or t1 - 1 + offset - reach >= s0
        mask = _band_mask(call, t1 - t0, s1 - s0, t0 + offset - s0, causal, reach) if hidden else None
        yield t0, t1, s0, s1, mask, False


def _chunks(call: Geometry, T: int, n: int, offset: int, origin: int, chunk: int) -> Iterator[Tile]:
    """Tiles like those of a causal `_band`, but each query sees only the keys of its own chunk; key 0 is at position
    `origin`."""
    first = max(0, -offset)
    last = min(T, (origin + n - 1) // chunk * chunk + chunk - origin - offset)  # later chunks have no keys
    step = max(1, _SHORT // chunk) * chunk  # short chunks share a tile
    while n > 0 and first < last:
        start = (first + offset + origin) // step * step - origin
        t0, first = first, min(last, start + step - offset)
        s0, s1 = max(0, start), min(n, first + offset)
        if step == chunk:
            for a, b, c, d, mask, causal in _band(call, first - t0, s1 - s0, t0 + offset - s0, True, None):
                yield t0 + a, t0 + b, s0 + c, s0 + d, mask, causal
            continue
        key = torch.arange(s0, s1, device=call.device) + origin
        query = torch.arange(t0, first, device=call.device)[:, None] + offset + origin
        yield t0, first, s0, s1, _additive((key <= query) & (key >= query // chunk * chunk), call.dtype), False


def _slots_of_chunks(T: int, slots: int, offset: int, chunk: int) -> Iterator[Tile]:
    """Tiles of T queries and the slots of their chunks; query t stands at t + offset, behind slot 0 at 0."""
    t0 = 0
    while t0 < T:
        begin = max(0, (t0 + offset) // chunk * chunk)
        if begin >= slots:
            return
        t1 = min(T, begin + chunk - offset)
        yield t0, t1, begin, slots, None, False
        t0 = t1


def _band_mask(call: Geometry, t: int, s: int, diagonal: int, causal: bool, window: int) -> Tensor:
    """[t, s]: 0 where key j ≤ i + diagonal (causal) and j > i + diagonal − window, −∞ elsewhere."""
    hidden = torch.full((t, s), float("-inf"), dtype=call.dtype, device=call.device)
    mask = hidden.triu(diagonal + 1) if causal else torch.zeros_like(hidden)
    return mask + hidden.tril(diagonal - window) if t + diagonal > window else mask


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
