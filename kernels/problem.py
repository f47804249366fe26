"""One call of the engine, as kernels want it: operands with strides, rows, prefixes, scales. Built once, by both passes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softkv.kernels.geometry import Groups, Operand, Prefix, Rows
from softkv.kernels.launch import target_of
from softkv.kernels.tiles import Target, Tile, block_d, tile

SIZES = ["B", "G", "T", "S", "A", "P", "window"]  # values that must not make a new binary
FARTHEST = 2**24  # elements from token to token: a tile of 256 is addressed by 32 bits
SMALLEST_SCALE = 1e-30  # a scale of 0 would make hidden scores −∞·0


def tokens(x: Tensor) -> Operand:
    """[B, H, T, D], or packed [N, H, D]."""
    if x.dim() == 3:
        return Operand(x, 0, x.stride(1), x.stride(0))
    return Operand(x, x.stride(0), x.stride(1), x.stride(2))


def per_item(x: Tensor) -> Operand:
    """One number an item: [B, H, T], or packed [H, N]."""
    if x.dim() == 2:
        return Operand(x, 0, x.stride(0), x.stride(1))
    return Operand(x, x.stride(0), x.stride(1), x.stride(2))


def slots(x: Tensor | None) -> Operand:
    """[A, G, P, D], or no prefix at all."""
    return Operand(None, 0, 0, 0) if x is None else Operand(x, x.stride(0), x.stride(1), x.stride(2))


@dataclass(frozen=True)
class Problem:
    """`T`, `S` are 0 when packed: a flat token's place is then its own. `T_max` is the longest row's number of queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    packed: bool
    B: int
    H: int
    G: int
    T: int
    S: int
    T_max: int
    S_max: int
    A: int
    P: int
    D: int
    tokens: int  # B·T, or N
    rows: Rows
    prefix: Prefix
    sinks: Tensor | None
    is_causal: bool
    window: int | None
    softcap: float | None
    scale: float
    flipped: bool  # the scale was negative: q was negated instead

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor | None,
        prefix_v: Tensor | None,
        *,
        prefix_index: Tensor | None,
        prefix_lengths: Tensor | None,
        key_mask: Tensor | None,
        key_lengths: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        sinks: Tensor | None,
        scale: float,
        is_causal: bool,
        window: int | None,
        window_covers_prefix: bool,
        softcap: float | None,
    ) -> "Problem":
        packed = cu_seqlens_q is not None
        for name, x in (
            ("k", tokens(k)),
            ("v", tokens(v)),
            ("prefix_k", slots(prefix_k)),
            ("prefix_v", slots(prefix_v)),
        ):
            if x.item >= FARTHEST:
                raise NotImplementedError(
                    f"backend 'triton': expected tokens of {name} less than {FARTHEST} elements apart, got {x.item}"
                )
        if packed:
            B, T, S, T_max, S_max = cu_seqlens_q.numel() - 1, 0, 0, max_seqlen_q, max_seqlen_k
            count, H, D = q.shape
        else:
            B, H, T, D = q.shape
            S = k.shape[2]
            T_max, S_max, count = T, S, B * T
        A, P = (0, 0) if prefix_k is None else (prefix_k.shape[0], prefix_k.shape[2])
        # 16 bits: Triton lays out matrix operands by the narrowest load behind them, and bytes would cost the loads ahead
        mask = None if key_mask is None else key_mask.to(torch.int16, memory_format=torch.contiguous_format)
        rows = Rows(cu_seqlens_q, cu_seqlens_k, key_lengths, mask)
        position = None
        if prefix_k is not None and window is not None and window_covers_prefix:
            position = slot_positions(rows, key_mask, B, T, S, count, q.device)
        return cls(
            q=-q if scale < 0 else q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, packed=packed,
            B=B, H=H, G=k.shape[1], T=T, S=S, T_max=T_max, S_max=S_max, A=A, P=P, D=D, tokens=count,
            rows=rows, prefix=Prefix(prefix_index, prefix_lengths, position), sinks=sinks, is_causal=is_causal,
            window=window, softcap=softcap, scale=max(abs(scale), SMALLEST_SCALE), flipped=scale < 0,
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.H // self.G

    @property
    def target(self) -> Target:
        return target_of(self.q)

    def tile(self, name: str) -> Tile:
        return tile(name, self.target, self.D, self.q.dtype, self.softcap is not None)

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes."""
        capped = self.softcap is not None
        tf32 = torch.get_float32_matmul_precision() != "highest" and self.target.arch.startswith("sm_")
        return dict(  # noqa: C408
            q=tokens(self.q), k=tokens(self.k), v=tokens(self.v), prefix_k=slots(self.prefix_k), prefix_v=slots(self.prefix_v),
            rows=self.rows, prefix=self.prefix, window=self.window,
            score_scale=(self.softcap if capped else self.scale) * math.log2(math.e),
            softcap_scale=self.scale / self.softcap if capped else None,
            B=self.B, G=self.G, T=self.T, S=self.S, A=self.A, P=self.P,
            CAUSAL=self.is_causal, SHARED=self.A == 1 and self.prefix.index is None, GROUP=self.group,
            HEAD_DIM=self.D, BLOCK_D=block_d(self.D), PRECISION="tf32" if tf32 else "ieee",
        )  # fmt: skip

    def workspace(self, x: Tensor) -> Operand:
        """One number an item, [H, tokens]."""
        return Operand(x, self.T, self.tokens, 1)

    def groups(self) -> Groups:
        """Group the tokens by prefix without leaving the device: fixed shapes, a stable sort, no host sync.

        Rows that read no prefix form a last group, number A.
        """
        index, device = self.prefix.index, self.q.device
        if index is None and self.A == 1:
            return Groups(None, None, None)
        if index is None and self.packed:
            return Groups(None, self.rows.cu_q, None)
        if index is None:
            return Groups(None, torch.arange(self.B + 1, device=device, dtype=torch.int32) * self.T, None)
        group, order = torch.sort(self.prefix_of_token(), stable=True)
        start = torch.searchsorted(group, torch.arange(self.A + 2, device=device))
        return Groups(order.to(torch.int32), start.to(torch.int32), None)

    def prefix_of_token(self) -> Tensor:
        """[tokens] the prefix that a flat token reads; A where it reads none."""
        index, device = self.prefix.index, self.q.device
        if index is None and self.A == 1:
            return torch.zeros(self.tokens, device=device, dtype=torch.int64)
        if index is None:
            index = torch.arange(self.B, device=device)
        index = torch.where((index >= 0) & (index < self.A), index, self.A).long()
        return index[row_of_token(self.rows, self.tokens)] if self.packed else index.repeat_interleave(self.T)

    def readers(self) -> Groups:
        """As `groups`. Under a window over the prefix a group goes by position: what sees a slot is then a run of it."""
        position = self.prefix.position
        if position is None:
            return self.groups()
        far, device = 2**32, self.q.device
        place, order = torch.sort(self.prefix_of_token() * far + position, stable=True)
        start = torch.searchsorted(place, torch.arange(self.A + 2, device=device) * far - far // 2)
        length = self.P if self.prefix.lengths is None else self.prefix.lengths.clamp(0, self.P).long()[:, None]
        first_hidden = torch.arange(self.P, device=device) - length + self.window  # position that no longer sees a slot
        a = torch.arange(self.A, device=device)[:, None]
        seen = torch.searchsorted(place, a * far + first_hidden) - start[: self.A, None]
        return Groups(*(x.to(torch.int32) for x in (order, start, seen)))


def row_of_token(rows: Rows, count: int) -> Tensor:
    """[N] the row each packed token belongs to."""
    ids = torch.arange(count, device=rows.cu_q.device, dtype=torch.int32)
    return (torch.searchsorted(rows.cu_q, ids, right=True) - 1).clamp(0, rows.cu_q.numel() - 2)


def slot_positions(
    rows: Rows, key_mask: Tensor | None, B: int, T: int, S: int, count: int, device: torch.device
) -> Tensor:
    """[tokens] a query's key position counted from its row's first visible key, where the prefix ends."""
    if rows.cu_q is not None:
        row = row_of_token(rows, count)
        t = torch.arange(count, device=row.device) - rows.cu_q[row]
        return (rows.cu_k.diff()[row] - rows.cu_q.diff()[row] + t).to(torch.int32)
    n = torch.full((B,), S, device=device) if rows.lengths is None else rows.lengths.clamp(0, S)
    if key_mask is not None and S > 0:
        exists = key_mask & (torch.arange(S, device=device) < n[:, None])
        n = n - exists.to(torch.int8).argmax(1)
    return (n[:, None] - T + torch.arange(T, device=device)).reshape(-1).to(torch.int32)
