"""The operands of one call in a common form for dense and packed rows: [N, H, ...], token by token."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from softkv.ops.engine import Call, empty_out

# Up to this many queries, rows that differ in what they see share one masked call; longer rows get separate slices,
# which skip the work that a mask only hides.
FEW_QUERIES = 32


@dataclass(slots=True)
class Queries:
    """The queries of a piece within [N, H, ...]: tokens t0:t1 of equally long rows, or individual tokens."""

    start: int
    rows: int
    length: int
    t0: int
    t1: int
    index: Tensor | None = None

    def of(self, line: Tensor) -> Tensor:
        """[N, H, ...] → [rows, H, t, ...]: a view, or a copy of individual tokens."""
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
    blind: Tensor | None = None  # [b, 1, t], queries that see nothing through the mask

    def keys(self, x: Tensor) -> Tensor:
        """[rows or 1, G, S, D] → [rows, G, s, D], a view."""
        if self.s1 - self.s0 < x.shape[2]:
            x = x[:, :, self.s0 : self.s1]
        if self.key_rows.stop - self.key_rows.start < x.shape[0]:
            x = x[self.key_rows]
        return x if x.shape[0] == self.queries.rows else x.expand(self.queries.rows, -1, -1, -1)


@dataclass(slots=True)
class RowGroup:
    """Adjacent rows with the same geometry: T queries and n keys, of which lo:hi are visible except for holes."""

    first: int
    rows: int
    start: int
    T: int
    key_row: int
    key_start: int
    n: int
    lo: int
    hi: int
    holes: Tensor | None = None  # [S] bool, the visible keys
    slots: int = 0  # of the prefix, where chunks count them


class Geometry:
    """The operands of one call, with dense and packed rows in the same form."""

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
        self.n: list[int] | None = None  # each row's number of keys, if that is not S
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
        """Whether the rows differ and have so few queries that one call with a mask is faster."""
        ragged = self.key_mask is not None or (self.n is not None and min(self.n) < max(self.n))
        return self.dense and ragged and self.T <= FEW_QUERIES

    @cached_property
    def extent(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For a dense call, [B] each: the number of keys n, and the first, the end (0, 0 if there are none) and the
        number of the visible ones."""
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
        """The indices in [N, ...] of the tokens of these rows."""
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
        """[N, H, D] in any precision → shape, dtype and layout of q; of another width, token by token."""
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
