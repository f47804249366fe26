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


@dataclass(slots=True)
class Queries:
    """Where a piece's queries lie in a line [N, H, ...]: a part t0:t1 of equally long rows, or tokens picked singly."""

    start: int
    rows: int
    length: int
    t0: int
    t1: int
    index: Tensor | None = None

    def of(self, line: Tensor) -> Tensor:
        """[N, H, ...] → [rows, H, t, ...]: a view, or a copy of picked tokens."""
        if self.index is not None:
            return line[self.index].unflatten(0, (self.rows, self.length)).transpose(1, 2)
        n, t = self.rows * self.length, self.t1 - self.t0
        part = line if n == line.shape[0] else line[self.start : self.start + n]
        part = part.view(self.rows, self.length, *part.shape[1:])
        return (part if t == self.length else part[:, self.t0 : self.t1]).transpose(1, 2)

    def back(self, x: Tensor) -> Tensor:
        """[rows, H, t, ...] → [rows·t, H, ...]"""
        return x.transpose(1, 2).flatten(0, 1)

    def whole(self, N: int) -> bool:
        return self.index is None and self.rows * (self.t1 - self.t0) == N


@dataclass(slots=True)
class Piece:
    queries: Queries
    key_rows: slice
    s0: int
    s1: int
    mask: Tensor | None = None
    causal: bool = False
    blind: Tensor | None = None  # [b, 1, t], queries from which the mask hides everything

    def keys(self, x: Tensor) -> Tensor:
        """[rows or 1, G, S, D] → [rows, G, s, D], a view."""
        if self.s1 - self.s0 < x.shape[2]:
            x = x[:, :, self.s0 : self.s1]
        if self.key_rows.stop - self.key_rows.start < x.shape[0]:
            x = x[self.key_rows]
        return x if x.shape[0] == self.queries.rows else x.expand(self.queries.rows, -1, -1, -1)


@dataclass(slots=True)
class RowGroup:
    """Adjacent rows of the same geometry: T queries and n keys, of which lo:hi are visible except for holes."""

    first: int
    rows: int
    start: int
    T: int
    key_row: int
    key_start: int
    n: int
    lo: int
    hi: int
    holes: Tensor | None = None  # [S] bool, keys that are seen
    slots: int = 0  # of the prefix, where chunks count them


class Geometry:
    """One call's operands brought into one form, dense and packed alike."""

    def __init__(self, options: Call, fused: bool, backward: bool):
        self.options, self.fused, self.backward = options, fused, backward
        q, k, prefix_k = options["q"], options["k"], options["prefix_k"]
        self.dtype, self.device = q.dtype, q.device
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.dense = q.dim() == 4
        self.window, self.chunk = options["window"], options["chunk"]
        self.covers = options["window_covers_prefix"]
        self.A, self.P = (0, 0) if prefix_k is None else (prefix_k.shape[0], prefix_k.shape[2])
        self.key_mask: Tensor | None = None
        self.n: list[int] | None = None  # each row's keys, where that is not S
        if self.dense:
            self.B, self.T, self.S = q.shape[0], q.shape[2], k.shape[2]
            self.N, self.H = self.B * self.T, q.shape[1]
            self.starts: list[int] | range = range(0, self.N + 1, self.T)
            mask, lengths = options["key_mask"], options["key_lengths"]
            self.key_mask = None if mask is None or bool(mask.all()) else mask
            self.n = None if lengths is None else lengths.tolist()
        else:
            self.N, self.S, self.H = q.shape[0], k.shape[0], q.shape[1]
            starts_q, starts_k, longest = options["cu_seqlens_q"], options["cu_seqlens_k"], options["max_seqlen_q"]
            assert starts_q is not None
            assert starts_k is not None
            assert longest is not None
            self.starts, self.key_starts = starts_q.tolist(), starts_k.tolist()
            self.B, self.T = len(self.starts) - 1, longest

    @property
    def masked(self) -> bool:
        """Whether few queries of rows that differ are better served by one call with a mask."""
        ragged = self.key_mask is not None or (self.n is not None and min(self.n) < max(self.n))
        return self.dense and ragged and self.T <= _FEW_QUERIES

    @cached_property
    def extent(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a dense call, [B] each: keys n, the seen ones' first and end (0, 0 if there are none) and number."""
        n = self.options["key_lengths"]
        n = torch.full((self.B,), self.S, device=self.device) if n is None else n.long()
        if self.key_mask is None or self.S == 0:
            return n, torch.zeros_like(n), n, n
        seen = (torch.arange(self.S, device=self.device) < n[:, None]) & self.key_mask
        number = seen.sum(1)
        end = self.S - seen.flip(1).int().argmax(1)
        return n, seen.int().argmax(1), end.masked_fill(number == 0, 0), number

    @cached_property
    def slots(self) -> list[int]:
        """Of each row's own prefix, where chunks count them; 0 elsewhere."""
        if self.P == 0 or self.chunk is None or not self.covers:
            return [0] * self.B
        index, lengths = self.options["prefix_index"], self.options["prefix_lengths"]
        of_prefix = [self.P] * self.A if lengths is None else lengths.tolist()
        of_rows = (b % self.A for b in range(self.B)) if index is None else index.tolist()
        return [of_prefix[a] if 0 <= a < self.A else 0 for a in of_rows]

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        if not self.dense:
            return [
                RowGroup(b, 1, q0, q1 - q0, 0, k0, k1 - k0, 0, k1 - k0, slots=self.slots[b])
                for b, ((q0, q1), (k0, k1)) in enumerate(
                    zip(pairwise(self.starts), pairwise(self.key_starts), strict=True)
                )
                if q1 > q0
            ]
        if self.key_mask is None and self.n is None and min(self.slots) == max(self.slots):
            return [RowGroup(0, self.B, 0, self.T, 0, 0, self.S, 0, self.S, slots=self.slots[0])]
        row_groups: list[RowGroup] = []
        extents = zip(*(x.tolist() for x in self.extent), self.slots, strict=True)
        for b, (n, lo, hi, number, slots) in enumerate(extents):
            last = row_groups[-1] if row_groups else None
            holes = self.key_mask[b] if self.key_mask is not None and number < hi - lo else None
            alike = last and (last.n, last.lo, last.hi, last.slots) == (n, lo, hi, slots)
            if last and alike and holes is None and last.holes is None:
                last.rows += 1
            else:
                row_groups.append(RowGroup(b, 1, b * self.T, self.T, b, 0, n, lo, hi, holes, slots))
        return row_groups

    def tokens_of(self, rows: list[int]) -> Tensor:
        """Where in the line the tokens of these rows are."""
        if self.dense:
            tokens = torch.arange(self.T, device=self.device)
            return (torch.tensor(rows, device=self.device)[:, None] * self.T + tokens).flatten()
        return torch.cat([torch.arange(self.starts[b], self.starts[b + 1], device=self.device) for b in rows])

    def line(self, x: Tensor) -> Tensor:
        """q-shaped → [N, H, D]"""
        return x.transpose(1, 2).flatten(0, 1) if self.dense else x.contiguous()

    def line_lse(self, x: Tensor) -> Tensor:
        """lse-shaped → [N, H]"""
        return x.transpose(1, 2).flatten(0, 1) if self.dense else x.transpose(0, 1).contiguous()

    def unline(self, x: Tensor, q: Tensor) -> Tensor:
        """[N, H, D] in any precision → shape, dtype and layout of q; of another width, laid out token by token."""
        x = x.unflatten(0, (self.B, self.T)).transpose(1, 2) if self.dense else x
        return x.to(q.dtype) if x.stride() == q.stride() else empty_out(q, x).copy_(x)

    def unline_lse(self, x: Tensor) -> Tensor:
        if self.dense:
            return x.view(self.B, self.T, -1).transpose(1, 2).contiguous()
        return x.transpose(0, 1).contiguous()

    def keys(self, x: Tensor) -> Tensor:
        """[B, G, S, D]; packed keys are one long row."""
        return x if self.dense else x.transpose(0, 1).unsqueeze(0)

    def unkeys(self, x: Tensor) -> Tensor:
        return x if self.dense else x.squeeze(0).transpose(0, 1)


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
