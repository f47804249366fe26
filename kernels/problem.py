"""What is known of a call without its values: sizes, strides, options. Every pass makes its plan from it."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softkv.kernels.geometry import Operands, Scale, Strides
from softkv.kernels.launch import Memory, Tensors, target_of
from softkv.kernels.tiles import Target, Tile, block_d, tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEAD_DIM = 256
SIZES = ["B", "G", "T", "S", "A", "P", "reach"]  # values that must not trigger a new compilation
FARTHEST = 2**24  # elements from token to token, so that a tile of 256 can be addressed with 32 bits
SMALLEST_SCALE = 1e-30  # a scale of 0 would make hidden scores −∞·0
NOWHERE = Strides(0, 0, 0)
READ = ["q", "k", "v", "prefix_k", "prefix_v"]
PER_ITEM = ("lse", "grad_lse")
SLOTS = ("prefix_k", "prefix_v")


class Options(NamedTuple):
    """The options of a call that are not tensors."""

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    scale: float
    is_causal: bool
    window: int | None
    window_covers_prefix: bool
    softcap: float | None
    chunk: int | None


def strides(name: str, x: Tensor) -> Strides:
    """Strides of [B, H, T, D], packed [N, H, D], a prefix [A, G, P, D], or one value per item: [B, H, T], packed [H,
    N]."""
    if name in PER_ITEM:
        return Strides(0, x.stride(0), x.stride(1)) if x.dim() == 2 else Strides(*x.stride())
    return Strides(0, x.stride(1), x.stride(0)) if x.dim() == 3 else Strides(*x.stride()[:3])


def like(x: Tensor) -> Memory:
    """The memory that `torch.empty_like` would allocate."""
    return Memory(tuple(x.shape), torch.empty_like(memory_of(Memory(x.shape, x.stride(), x.dtype))).stride(), x.dtype)


def output(q: Tensor, width: int) -> Memory:
    """With q's layout if values are as wide as keys, otherwise token by token."""
    if width == q.shape[-1]:
        return like(q)
    if q.dim() == 3:
        return contiguous((*q.shape[:2], width), q.dtype)
    B, H, T, _ = q.shape
    return Memory((B, H, T, width), (T * H * width, width, H * width, 1), q.dtype)


def contiguous(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Memory:
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Memory(shape, stride, dtype)


@dataclass(frozen=True)
class Problem:
    """`T` and `S` are 0 if packed, where a flat token's index is its position in memory. `T_max` is the longest row's
    number of queries."""

    like: dict[str, Memory]  # the memory of each operand's gradient, and of "out" and "lse"
    stride: dict[str, Strides]
    given: frozenset[str]  # the tensors given in the call, and `position` if it is needed
    dtype: torch.dtype
    target: Target
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
    value_dim: int
    tokens: int  # B·T, or N
    is_causal: bool
    reach: int | None  # of a window, or the size of chunks
    chunked: bool
    softcap: float | None
    scale: float
    flipped: bool  # the scale was negative: q is negated instead
    tf32: bool
    linear: bool  # whether flat token u is u items from the start of q and grad_out
    wide: bool  # whether their offsets exceed 31 bits

    @classmethod
    def of(cls, x: Tensors, options: Options) -> "Problem":
        q, k, v, prefix_k, cu_q = (x[name] for name in ("q", "k", "v", "prefix_k", "cu_seqlens_q"))
        if q.dtype not in DTYPES or max(q.shape[-1], v.shape[-1]) > MOST_HEAD_DIM:
            wanted = f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)} and D ≤ {MOST_HEAD_DIM}"
            raise NotImplementedError(f"backend 'triton': expected {wanted}, got {q.dtype} and D = {q.shape[-1]}")
        given = {name for name, tensor in x.items() if tensor is not None}
        stride = {
            name: strides(name, x[name])
            for name in (*READ, "out", "lse", "grad_out", "grad_lse")
            if x.get(name) is not None
        }
        for name in READ[1:]:
            if name in given and stride[name].item >= FARTHEST:
                raise NotImplementedError(
                    f"backend 'triton': expected tokens of {name} less than {FARTHEST} elements apart, "
                    f"got {stride[name].item}"
                )
        if options.chunk is not None and options.window_covers_prefix:
            raise NotImplementedError(
                "backend 'triton': expected chunks counted from a row's first key, got window_covers_prefix=True"
            )
        if cu_q is not None:
            B, T, S, T_max, S_max = cu_q.shape[0] - 1, 0, 0, options.max_seqlen_q or 0, options.max_seqlen_k or 0
            count, H, D = q.shape
        else:
            B, H, T, D = q.shape
            S = k.shape[2]
            T_max, S_max, count = T, S, B * T
        A, P = (0, 0) if prefix_k is None else (prefix_k.shape[0], prefix_k.shape[2])
        out = output(q, v.shape[-1])
        lse = contiguous((H, count) if cu_q is not None else (B, H, T))
        memory = {name: like(x[name]) for name in READ if name in given} | {"out": out, "lse": lse}
        stride = {name: strides(name, memory_of(memory[name])) for name in ("out", "lse")} | stride
        flipped = options.scale < 0
        if flipped:
            q = memory_of(memory["q"])
            stride["q"] = strides("q", q)
        if prefix_k is not None and options.window is not None and options.window_covers_prefix:
            given.add("position")
        walked = [q] if x.get("grad_out") is None else [q, x["grad_out"]]
        target = target_of(x["q"])
        tf32 = torch.get_float32_matmul_precision() != "highest" and target.arch.startswith("sm_")
        return cls(
            like=memory, stride=stride, given=frozenset(given), dtype=q.dtype, target=target,
            B=B, H=H, G=k.shape[1], T=T, S=S, T_max=T_max, S_max=S_max, A=A, P=P, D=D, value_dim=v.shape[-1],
            tokens=count, is_causal=options.is_causal,
            reach=options.window if options.chunk is None else options.chunk, chunked=options.chunk is not None,
            softcap=options.softcap, scale=max(abs(options.scale), SMALLEST_SCALE), flipped=flipped,
            tf32=tf32, linear=all(linear(t) for t in walked), wide=any(wide(t) for t in walked),
        )  # fmt: skip

    @property
    def group(self) -> int:
        return self.H // self.G

    @property
    def packed(self) -> bool:
        return "cu_seqlens_q" in self.given

    @property
    def shared(self) -> bool:
        """Whether all rows read the same prefix."""
        return self.A == 1 and "prefix_index" not in self.given

    def tile(self, name: str) -> Tile:
        return tile(name, self.target, max(self.D, self.value_dim), self.dtype, self.softcap is not None)

    def pointers(self, *names: str) -> dict[str, str]:
        """Those of the named fields that this call has or allocates."""
        optional = {*READ, "sinks", "key_lengths", "key_mask", "prefix_index", "prefix_lengths", "position", "grad_lse",
                    "cu_seqlens_q", "cu_seqlens_k"}  # fmt: skip
        return {name: name for name in names if name in self.given or name not in optional}

    def strides(self, *names: str) -> Operands:
        own = Strides(self.T, self.tokens, 1)  # of one value per item, [H, tokens]
        known = self.stride | {"delta": own}
        known |= {f"d{name}": strides(name, memory_of(m)) for name, m in self.like.items() if name in READ}
        return Operands(**{name: known[name] for name in names if name in known})

    @property
    def dims(self) -> dict[str, Any]:
        """The constants of every pass over keys or items."""
        return dict(  # noqa: C408
            GROUP=self.group, HEAD_DIM=self.D, VALUE_DIM=self.value_dim, BLOCK_D=block_d(self.D),
            BLOCK_V=block_d(self.value_dim), PRECISION="tf32" if self.tf32 else "ieee",
        )  # fmt: skip

    @property
    def sizes(self) -> dict[str, Any]:
        return dict(B=self.B, G=self.G, T=self.T, S=self.S, A=self.A, P=self.P, reach=self.reach)  # noqa: C408

    @property
    def scales(self) -> Scale:
        return Scale(
            score=(self.softcap or self.scale) * math.log2(math.e),
            softcap=self.scale / self.softcap if self.softcap else None,
            dq=-self.scale if self.flipped else self.scale,
            dk=self.scale,
        )

    def preparations(self) -> list[Any]:
        """The steps that convert a call's tensors to what kernels read."""
        steps: list[Any] = []
        if self.flipped:
            steps.append(negate_queries)
        if "position" in self.given:
            steps.append(self.find_positions)
        if "key_mask" in self.given:
            steps.append(widen_mask)
        return steps

    def find_positions(self, x: Tensors) -> None:
        """[tokens] a query's key position counted from its row's first visible key, where the prefix ends."""
        if self.packed:
            cu_q, cu_k = x["cu_seqlens_q"], x["cu_seqlens_k"]
            row = row_of_token(cu_q, self.tokens)
            t = torch.arange(self.tokens, device=row.device) - cu_q[row]
            x["position"] = (cu_k.diff()[row] - cu_q.diff()[row] + t).to(torch.int32)
            return
        lengths, mask, device = x["key_lengths"], x["key_mask"], x["q"].device
        n = torch.full((self.B,), self.S, device=device) if lengths is None else lengths.clamp(0, self.S)
        if mask is not None and self.S > 0:
            exists = mask & (torch.arange(self.S, device=device) < n[:, None])
            n = n - exists.to(torch.int8).argmax(1)
        x["position"] = (n[:, None] - self.T + torch.arange(self.T, device=device)).reshape(-1).to(torch.int32)


def memory_of(m: Memory) -> Tensor:
    return torch.empty_strided(m.shape, m.stride, device="meta")


def negate_queries(x: Tensors) -> None:
    x["q"] = -x["q"]


def widen_mask(x: Tensors) -> None:
    """Convert to 16 bits: Triton lays out matrix operands by the narrowest load that feeds them, and byte loads would
    prevent pipelining."""
    x["key_mask"] = x["key_mask"].to(torch.int16, memory_format=torch.contiguous_format)


def row_of_token(cu_seqlens: Tensor, count: int) -> Tensor:
    """[N] the row of each packed token."""
    ids = torch.arange(count, device=cu_seqlens.device, dtype=torch.int32)
    return (torch.searchsorted(cu_seqlens, ids, right=True) - 1).clamp(0, cu_seqlens.shape[0] - 2)


def linear(x: Tensor) -> bool:
    """Whether flat token u is u items from the start: packed, or [B, T, H, D] in memory."""
    return x.dim() == 3 or x.stride(0) == x.shape[2] * x.stride(2)


def wide(x: Tensor) -> bool:
    """Whether offsets in x exceed 31 bits."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31
