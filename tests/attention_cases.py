"""Named inputs of the op, each with the reason it is awkward, and the comparison every backend goes through."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from softkv.ops.api import prefix_attention, prefix_attention_varlen

LEAVES = ("q", "k", "v", "prefix_k", "prefix_v", "sinks")


@dataclass
class Case:
    """One call: the leaves that take gradients, and the remaining arguments."""

    leaves: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return self.leaves["q"].dim() == 3

    def to(self, dtype: torch.dtype) -> "Case":
        return Case({name: x.detach().to(dtype).requires_grad_() for name, x in self.leaves.items()}, self.options)

    def call(self, **overrides: Any) -> tuple[Tensor, Tensor]:
        op: Callable[..., Any] = prefix_attention_varlen if self.packed else prefix_attention
        return op(**{**self.leaves, **self.options, **overrides}, return_lse=True)

    def directions(self, backend: str | None = None) -> list[Tensor]:
        """One fixed random direction of grad_out and grad_lse."""
        with torch.no_grad():
            results = self.call(backend=backend)
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in results]

    def run(
        self, backend: str | None = None, with_lse: bool = True, directions: list[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs and the gradient of every leaf, for `directions` of grad_out and grad_lse."""
        out, lse = self.call(backend=backend)
        directions = directions or self.directions(backend)
        targets = ([out, lse], directions) if with_lse else ([out], directions[:1])
        grads = torch.autograd.grad(targets[0], list(self.leaves.values()), targets[1])
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(self.leaves, grads, strict=True))}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def dense(B=2, H=4, G=2, T=5, S=None, D=16, Dv=None, A=None, P=0, sinks=False, seed=0, **options: Any) -> Case:
    """A = None: as many prefixes as rows where there is no index."""
    torch.manual_seed(seed)
    S, Dv = T if S is None else S, D if Dv is None else Dv
    leaves = {"q": _random(B, T, H, D).transpose(1, 2), "k": _random(B, G, S, D), "v": _random(B, G, S, Dv)}
    if P or A:
        leaves |= {"prefix_k": _random(A or B, G, P, D), "prefix_v": _random(A or B, G, P, Dv)}
    if sinks:
        leaves["sinks"] = _random(H)
    return Case({name: x.requires_grad_() for name, x in leaves.items()}, options)


def packed(
    lengths_q, lengths_k=None, H=4, G=2, D=16, Dv=None, A=None, P=0, sinks=False, seed=0, **options: Any
) -> Case:
    torch.manual_seed(seed)
    Dv = D if Dv is None else Dv
    lengths_k = lengths_q if lengths_k is None else lengths_k
    leaves = {
        "q": _random(sum(lengths_q), H, D),
        "k": _random(sum(lengths_k), G, D),
        "v": _random(sum(lengths_k), G, Dv),
    }
    if P or A:
        rows = len(lengths_q)
        leaves |= {"prefix_k": _random(A or rows, G, P, D), "prefix_v": _random(A or rows, G, P, Dv)}
    if sinks:
        leaves["sinks"] = _random(H)
    options |= {
        "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0).int(),
        "cu_seqlens_k": torch.tensor([0, *lengths_k]).cumsum(0).int(),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
    }
    return Case({name: x.requires_grad_() for name, x in leaves.items()}, options)


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def mask(*rows: str) -> Tensor:
    return torch.tensor([[c == "1" for c in row] for row in rows])


# Built when asked for: name (the reason) → case.
CASES: dict[str, Callable[[], Case]] = {
    "no prefix": lambda: dense(),
    "shared prefix": lambda: dense(P=7, A=1),
    "one prefix a row": lambda: dense(P=7),
    "bank with a row without prefix": lambda: dense(B=4, A=3, P=7, prefix_index=index(2, -1, 0, 2)),
    "ragged bank, a prefix of length 0": lambda: dense(
        B=4, A=3, P=7, prefix_index=index(2, -1, 0, 1), prefix_lengths=index(7, 0, 3)
    ),
    "ragged rows": lambda: dense(B=3, P=7, prefix_lengths=index(7, 0, 3)),
    "shared prefix, shortened": lambda: dense(P=7, A=1, prefix_lengths=index(4)),
    "P = 0": lambda: dense(P=0, A=1),
    "P = 1": lambda: dense(P=1, A=1),
    "long odd P": lambda: dense(P=131, A=1, T=37),
    "H = G": lambda: dense(H=3, G=3, P=7, A=1),
    "G = 1": lambda: dense(H=4, G=1, P=7, A=1),
    "D = 80": lambda: dense(D=80, P=7, A=1),
    "one row": lambda: dense(B=1, P=7),
    "one query": lambda: dense(T=1, S=9, P=7, A=1),
    "one query, ragged cache": lambda: dense(B=3, T=1, S=9, P=7, A=1, key_lengths=index(9, 0, 4)),
    "few queries, ragged bank, more readers of some": lambda: dense(
        B=7, T=2, S=9, A=4, P=7, prefix_index=index(2, 1, 3, 2, -1, 3, 2), prefix_lengths=index(7, 2, 7, 5)
    ),
    "one query, bank": lambda: dense(B=4, T=1, S=9, A=2, P=7, prefix_index=index(1, -1, 0, 1)),
    "one query, a prefix a row": lambda: dense(B=3, T=1, S=9, P=7, prefix_lengths=index(7, 2, 0)),
    "one query, padding": lambda: dense(T=1, S=6, P=3, A=1, key_mask=mask("001111", "110110")),
    "one query, nothing but padding": lambda: dense(T=1, S=6, P=3, A=1, key_mask=mask("000000", "110110")),
    "T < S": lambda: dense(T=3, S=9, P=7, A=1),
    "T > S: the first queries see no token": lambda: dense(T=9, S=4, P=7, A=1),
    "T > S without prefix: out 0, lse −inf": lambda: dense(T=9, S=4),
    "S = 0": lambda: dense(T=3, S=0, P=7, A=1),
    "S = 0 without prefix": lambda: dense(T=3, S=0),
    "no query": lambda: dense(T=0, S=4, P=7, A=1),
    "no row": lambda: dense(B=0, T=3, P=7, A=1),
    "not causal": lambda: dense(P=7, A=1, is_causal=False),
    "not causal, T ≠ S": lambda: dense(T=3, S=8, P=7, A=1, is_causal=False),
    "left padding": lambda: dense(B=3, T=6, P=3, A=1, key_mask=mask("001111", "111111", "000000")),
    "right padding": lambda: dense(T=6, P=3, A=1, key_mask=mask("111100", "111111")),
    "padding with holes": lambda: dense(T=6, P=3, A=1, key_mask=mask("010110", "101011")),
    "padding, not causal": lambda: dense(T=6, P=3, A=1, is_causal=False, key_mask=mask("010110", "001100")),
    "everything masked, no prefix": lambda: dense(T=4, key_mask=mask("0000", "0000")),
    "part-filled cache": lambda: dense(B=3, T=2, S=9, P=3, A=1, key_lengths=index(9, 0, 5)),
    "part-filled cache, same everywhere": lambda: dense(T=3, S=9, P=3, A=1, key_lengths=index(7, 7)),
    "part-filled cache with padding": lambda: dense(
        T=2, S=6, P=3, A=1, key_lengths=index(4, 6), key_mask=mask("001111", "011111")
    ),
    "window": lambda: dense(T=9, P=3, A=1, window=4),
    "window of one": lambda: dense(T=9, P=3, A=1, window=1),
    "window, T < S": lambda: dense(T=3, S=12, P=3, A=1, window=4),
    "window with padding": lambda: dense(T=6, P=3, A=1, window=3, key_mask=mask("001111", "111011")),
    "window over the prefix": lambda: dense(T=9, P=7, A=1, window=4, window_covers_prefix=True),
    "window over the prefix, padded": lambda: dense(
        T=6, P=7, A=1, window=5, window_covers_prefix=True, key_mask=mask("001111", "111111")
    ),
    "window over a ragged bank": lambda: dense(
        B=4, T=6, A=3, P=7, window=5, window_covers_prefix=True, prefix_index=index(2, -1, 0, 1),
        prefix_lengths=index(7, 0, 3),
    ),
    "window over the prefix, one query": lambda: dense(
        B=2, T=1, S=6, A=1, P=7, window=9, window_covers_prefix=True, key_mask=mask("001111", "111111")
    ),
    "tiles of queries": lambda: dense(T=150, P=5, A=1),
    "tiles of queries, T < S": lambda: dense(T=150, S=200, P=5, A=1),
    "tiles of queries, T > S": lambda: dense(T=200, S=150, P=5, A=1),
    "tiles of queries, softcap": lambda: dense(T=150, P=5, A=1, softcap=2.0),
    "tiles of queries, padding and holes": lambda: dense(
        B=3, T=140, P=5, A=1, key_mask=mask("0" * 30 + "1" * 110, "1" * 99 + "0" * 41, "011" * 46 + "00")
    ),
    "more than a few queries, left padding and holes": lambda: dense(
        T=40, P=5, A=1, key_mask=mask("000" + "1101" * 9 + "1", "1" * 40)
    ),
    "tiles of queries, window": lambda: dense(T=200, S=230, P=5, A=1, window=70),
    "tiles of queries, window over the prefix": lambda: dense(
        B=5, H=2, G=1, T=150, P=90, A=1, window=100, window_covers_prefix=True
    ),
    "tiles of queries, a window inside a hole": lambda: dense(
        T=140, P=5, A=1, window=30, key_mask=mask("1" * 140, "1" * 20 + "0" * 80 + "1" * 40)
    ),
    "tiles of queries, a window inside a hole, no prefix": lambda: dense(
        T=140, window=30, key_mask=mask("1" * 140, "1" * 20 + "0" * 80 + "1" * 40)
    ),
    "one query, a row that sees nothing": lambda: dense(B=3, T=1, S=9, key_lengths=index(9, 0, 4)),
    "long queries": lambda: dense(B=1, H=2, G=1, T=1030, P=5, D=8),
    "chunks of queries and a rest": lambda: dense(B=3, T=131, P=5, A=1),
    "packed, tiles of queries": lambda: packed([130, 3, 260], P=5, A=1),
    "packed, bank, rows of one prefix apart": lambda: packed([30, 3, 40, 7], A=2, P=5, prefix_index=index(1, 0, 1, 0)),
    "window over a prefix of length 0, one query": lambda: dense(
        T=1, S=6, A=1, P=7, window=2, window_covers_prefix=True, prefix_lengths=index(0), key_lengths=index(6, 3)
    ),
    "window over the prefix, few queries of rows that differ": lambda: dense(
        B=3, T=4, S=6, A=1, P=7, window=6, window_covers_prefix=True, key_lengths=index(6, 3, 0),
        key_mask=mask("001111", "111111", "111111"),
    ),
    "window wider than everything": lambda: dense(T=9, P=7, A=1, window=16, window_covers_prefix=True),
    "softcap": lambda: dense(P=7, A=1, softcap=1.5),
    "sinks": lambda: dense(P=7, A=1, sinks=True),
    "sinks where nothing is seen": lambda: dense(T=9, S=4, sinks=True),
    "scale": lambda: dense(P=7, A=1, scale=0.3),
    "scale below 0": lambda: dense(P=7, A=1, scale=-0.3),
    "scale of 0: the mean of what is seen": lambda: dense(P=7, A=1, scale=0.0),
    "everything at once": lambda: dense(
        B=3, T=5, S=7, A=2, P=6, sinks=True, softcap=2.0, window=4, window_covers_prefix=True, scale=0.4,
        prefix_index=index(1, -1, 0), prefix_lengths=index(6, 3), key_lengths=index(7, 4, 0),
        key_mask=mask("0111011", "1111111", "1011111"),
    ),
    "packed": lambda: packed([3, 5, 1], P=7, A=1),
    "packed without prefix": lambda: packed([3, 5, 1]),
    "packed, rows of length 0": lambda: packed([0, 3, 0, 5, 0], P=7, A=1),
    "packed, a prefix a row": lambda: packed([3, 0, 2], P=7, prefix_lengths=index(7, 7, 2)),
    "packed, bank": lambda: packed([3, 4, 2], A=2, P=7, prefix_index=index(1, -1, 1)),
    "packed, keys longer and shorter": lambda: packed([3, 4, 2], [5, 0, 1], P=3, A=1),
    "packed, equal rows": lambda: packed([4, 4, 4], P=7, A=1, sinks=True),
    "packed, window over ragged rows": lambda: packed(
        [6, 1, 3], P=5, window=4, window_covers_prefix=True, prefix_lengths=index(5, 1, 0), sinks=True
    ),
    "packed, not causal": lambda: packed([3, 5, 1], P=7, A=1, is_causal=False, softcap=3.0),
    "packed, no row": lambda: packed([0], P=7, A=1),
}  # fmt: skip

# The torch engine's alone.
COUNTED_CHUNKS: dict[str, Callable[[], Case]] = {
    "chunks that count slots": lambda: dense(T=11, P=6, A=1, chunk=4, window_covers_prefix=True),
    "chunks that count slots, padded": lambda: dense(
        B=3, T=6, P=5, chunk=4, window_covers_prefix=True, key_mask=mask("001111", "111110", "000000")
    ),
    "chunks that count slots, many queries, lengths, holes": lambda: dense(
        B=4, T=40, S=50, A=2, P=7, chunk=9, window_covers_prefix=True, prefix_lengths=index(7, 3),
        prefix_index=index(1, -1, 0, 1), key_lengths=index(50, 45, 50, 7),
        key_mask=mask("011" * 16 + "00", *["1" * 50] * 3),
    ),
    "packed, chunks that count slots": lambda: packed(
        [7, 0, 12, 3], P=5, chunk=4, window_covers_prefix=True, prefix_lengths=index(5, 1, 3, 0)
    ),
}  # fmt: skip

# Options that not every engine serves.
CHUNKS_AND_WIDTHS: dict[str, Callable[[], Case]] = {
    "chunks": lambda: dense(T=11, P=3, A=1, chunk=4),
    "chunks, T < S: the first query stands inside one": lambda: dense(T=5, S=15, P=3, A=1, chunk=4),
    "chunks, T > S": lambda: dense(T=15, S=6, P=3, A=1, chunk=4),
    "chunks without prefix": lambda: dense(T=9, chunk=3),
    "chunks of one": lambda: dense(T=9, P=3, A=1, chunk=1),
    "one chunk, longer than everything": lambda: dense(T=9, P=3, A=1, chunk=100),
    "chunks that share tiles": lambda: dense(B=1, T=230, S=235, P=3, A=1, chunk=10),
    "chunks longer than tiles": lambda: dense(B=1, H=2, G=1, T=300, S=333, P=3, A=1, chunk=128),
    "chunks, padded": lambda: dense(B=3, T=6, P=3, A=1, chunk=2, key_mask=mask("001111", "111110", "000000")),
    "chunks, many queries, padded, and holes": lambda: dense(
        B=3, T=140, P=5, A=1, chunk=32, key_mask=mask("0" * 30 + "1" * 110, "1" * 99 + "0" * 41, "011" * 46 + "00")
    ),
    "chunks, part-filled cache": lambda: dense(B=3, T=2, S=9, P=3, A=1, chunk=4, key_lengths=index(9, 0, 5)),
    "chunks, part-filled cache, many queries": lambda: dense(
        B=3, T=40, S=90, P=3, A=1, chunk=7, key_lengths=index(90, 30, 64)
    ),
    "chunks, one query": lambda: dense(T=1, S=9, P=3, A=1, chunk=4),
    "chunks, one query, the first of its chunk": lambda: dense(T=1, S=9, P=3, A=1, chunk=8, sinks=True),
    "chunks, softcap, bank": lambda: dense(B=3, T=9, A=2, P=3, chunk=4, softcap=2.0, prefix_index=index(1, -1, 0)),
    "packed, chunks": lambda: packed([7, 0, 12, 3], [9, 0, 12, 5], P=3, A=1, chunk=4, sinks=True),
    "narrow values": lambda: dense(T=9, D=24, Dv=16, P=7, A=1),
    "wide values": lambda: dense(T=9, D=16, Dv=24, P=7, A=1, sinks=True),
    "narrow values, many queries": lambda: dense(T=40, D=24, Dv=16, P=7, A=1, sinks=True),
    "wide values, many queries": lambda: dense(T=40, S=45, D=16, Dv=24, P=7, A=1),
    "values of one number": lambda: dense(T=20, D=16, Dv=1, P=7),
    "narrow values, one query": lambda: dense(T=1, S=9, D=24, Dv=16, P=7, A=1),
    "narrow values, softcap": lambda: dense(T=20, D=24, Dv=16, P=7, A=1, softcap=2.0),
    "narrow values, T > S without prefix": lambda: dense(T=30, S=4, D=24, Dv=16),
    "wide values, no key": lambda: dense(T=30, S=0, D=16, Dv=24),
    "narrow values, ragged bank, padding": lambda: dense(
        B=3, T=20, D=24, Dv=16, A=2, P=7, prefix_index=index(1, -1, 0), prefix_lengths=index(4, 7),
        key_mask=mask("0" * 4 + "1" * 16, "1" * 20, "01" * 10),
    ),
    "narrow values, no query": lambda: dense(T=0, S=4, D=24, Dv=16, P=7, A=1),
    "packed, narrow values": lambda: packed([3, 20, 0], D=24, Dv=16, P=7, A=1, sinks=True),
    "packed, wide values, chunks": lambda: packed([3, 20, 0], D=16, Dv=24, P=7, A=1, chunk=6),
    "cross-attention": lambda: dense(B=3, T=40, S=70, P=7, A=1, is_causal=False, key_lengths=index(70, 3, 0)),
    "cross-attention, fewer keys": lambda: dense(T=70, S=40, P=7, is_causal=False, D=24, Dv=16),
}  # fmt: skip
